"""Check that the private names of other libraries that the package uses still exist, and report any that do not."""

import ast
import atexit
import importlib
import re
from pathlib import Path

import pytest
import torch
from optuna.trial import create_trial
from timm.optim import Lookahead
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2

import sasa_train

AUTO = v2.AutoAugment()
# The library, the object that has the name (or a function that creates it), the name, and the module that uses it.
NAMES = [
    ("torch", lambda: iter(DataLoader([0], num_workers=1)), "_workers", "data/workers.py"),
    ("torch", lambda: iter(DataLoader([0], num_workers=1)), "_shutdown_workers", "data/workers.py"),
    ("torch", lambda: iter(DataLoader([0], num_workers=1)), "_worker_pids_set", "data/workers.py"),
    ("torch", lambda: torch.utils.data, "_utils", "data/workers.py"),
    ("torch", lambda: torch.utils.data._utils.signal_handling, "_remove_worker_pids", "data/workers.py"),
    ("torch", torch.nn.Module, "_forward_hooks", "models/stem_norm.py"),
    ("torch", torch.nn.Module, "_forward_pre_hooks", "models/stem_norm.py"),
    ("torch", torch.nn.Module, "_backward_hooks", "models/stem_norm.py"),
    ("torch", torch.nn.Module, "_backward_pre_hooks", "models/stem_norm.py"),
    ("torch", lambda: torch.nn.modules.batchnorm, "_BatchNorm", "models/build.py"),
    ("torch", lambda: torch.empty(1).untyped_storage(), "_cdata", "models/counting.py"),
    ("torch", lambda: torch, "_dynamo", "benchmark/contenders.py"),
    ("torch", lambda: torch, "_subclasses", "attention/compiling.py"),
    ("torch", lambda: torch.utils, "_python_dispatch", "attention/compiling.py"),
    ("torch", lambda: torch, "_library", "attention/operators.py"),
    ("torch", lambda: torch, "_C", "attention/operators.py"),
    ("torch", lambda: torch._C, "_are_functorch_transforms_active", "attention/operators.py"),
    ("torch", lambda: torch, "_functorch", "attention/operators.py"),
    ("torch", lambda: torch.zeros(1), "_version", "training/hooks.py"),
    ("torch", lambda: torch, "_foreach_mul_", "training/imbalance.py"),
    ("python", lambda: atexit, "_run_exitfuncs", "processes/collectives.py"),
    ("torchvision", lambda: AUTO, "_AUGMENTATION_SPACE", "data/policies.py"),
    ("torchvision", v2.RandAugment, "_AUGMENTATION_SPACE", "data/policies.py"),
    ("torchvision", v2.TrivialAugmentWide, "_AUGMENTATION_SPACE", "data/policies.py"),
    ("torchvision", lambda: AUTO, "_policies", "data/policies.py"),
    ("torchvision", lambda: AUTO, "_fill", "data/policies.py"),
    ("torchvision", lambda: AUTO, "_apply_image_or_video_transform", "data/policies.py"),
    ("hydra", lambda: importlib.import_module("hydra"), "_internal", "training/hydra_launch.py"),
    ("hydra", lambda: importlib.import_module("hydra"), "_internal", "config/compose.py"),
    ("optuna", lambda: create_trial(value=0.0), "_trial_id", "sweep/search.py"),
    ("timm", lambda: Lookahead(torch.optim.SGD([torch.zeros(1)])), "_base_optimizer", "training/optim.py"),
    ("tensorboard", lambda: SummaryWriter, "_get_file_writer", "training/log.py"),
]
NOT_PRIVATE = {"_exit", "_replace", "_target_"}  # public despite the underscore: in os, named tuples and Hydra


@pytest.mark.parametrize("library,owner,name,module", NAMES, ids=lambda x: x if isinstance(x, str) else "")
def test_the_library_still_has_the_name(library, owner, name, module):
    assert hasattr(owner(), name), f"{library} has no {name} any more, on which sasa_train/{module} leans"


def test_torchvisions_operations_are_still_called_the_same():
    """Check that each operation of the three tables can be applied to a batch, using its middle magnitude."""
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    for transform in (AUTO, v2.RandAugment(), v2.TrivialAugmentWide()):
        for name, (magnitudes_of, is_signed) in transform._AUGMENTATION_SPACE.items():
            magnitudes = magnitudes_of(10, 8, 8)
            magnitude = 0.0 if magnitudes is None else float(magnitudes[5])
            how = {"interpolation": transform.interpolation, "fill": transform._fill}
            changed = transform._apply_image_or_video_transform(images, name, magnitude, **how)
            assert changed.shape == images.shape, f"torchvision's {name} is called in another way"
            assert isinstance(is_signed, bool), f"torchvision's _AUGMENTATION_SPACE[{name!r}] has changed"
    assert len(AUTO._policies[0][0]) == 3, "torchvision's _policies have changed"


def test_hydra_still_gives_a_launcher_its_callbacks():
    from hydra.types import HydraContext

    callbacks = importlib.import_module("hydra._internal.callbacks").Callbacks
    assert HydraContext(None, callbacks(None)).callbacks.callbacks == [], "hydra._internal.callbacks has changed"


def test_submitit_still_waits_for_a_job_in_results():
    """Check that submitit calls `results()[0]` on each job, which hydra_launch.py relies on to report dead jobs."""
    import inspect

    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
    from submitit import Job

    assert callable(Job.results), "submitit's Job has no results() any more"
    assert ".results()[0]" in inspect.getsource(BaseSubmititLauncher.launch), "the launcher asks in another way"


def private_names(path: Path) -> set[str]:
    """Return the private names of other libraries that a module imports or accesses as attributes."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    own = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")}
    imports = [part for node in nodes if isinstance(node, ast.ImportFrom) for part in (node.module or "").split(".")]
    found = {node.attr for node in attributes} - own | set(imports)
    return {name for name in found if re.match(r"_[a-zA-Z]", name)} - NOT_PRIVATE


def test_every_private_name_that_we_use_is_listed_here():
    """Check that all private names in use are listed; if an unlisted one were renamed, only users would notice."""
    root, listed = Path(sasa_train.__file__).parent, {(module, name) for *_, name, module in NAMES}
    for path in root.rglob("*.py"):
        module = path.relative_to(root).as_posix()
        missing = {name for name in private_names(path) if (module, name) not in listed}
        assert not missing, f"sasa_train/{module}: {missing}; use a public name, or list it"
