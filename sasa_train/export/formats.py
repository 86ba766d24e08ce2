"""Export formats, with functions that write them and load them again for verification."""

import contextlib
import copy
import functools
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sasa_train.attention import plain_decompositions
from sasa_train.config.derived import input_size
from sasa_train.config.saved import load_config
from sasa_train.export.checking import Run
from sasa_train.export.description import describe, model_card, timm_data_config
from sasa_train.models import AttentionStem, LocalSelfAttention2d, build_model
from sasa_train.runs.weights import read_safetensors
from sasa_train.trained import TrainedModel

OPSET = 18  # the version that torch.onnx writes without conversion
# Fields with which timm describes its own weights for an architecture.
OF_OTHER_WEIGHTS = ("tag", "license", "description", "origin_url", "notes")


class Source:
    """A trained model and its exported program, from which two of the formats are made."""

    def __init__(self, trained: TrainedModel):
        self.trained = trained

    @functools.cached_property
    def program(self) -> torch.export.ExportedProgram:
        return plain_program(self.trained.model, torch.zeros(2, *self.trained.input_size))


def plain_program(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """Export `model` using PyTorch's own operators, with a dynamic batch size and without source file paths."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, AttentionStem | LocalSelfAttention2d):
            module.backend = "reference"
    with torch.no_grad(), quiet():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        program = program.run_decompositions(plain_decompositions())
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def onnx_program(program: torch.export.ExportedProgram) -> torch.onnx.ONNXProgram:
    """Convert a program to ONNX, with input `images` [batch, C, H, W] and output `logits`."""
    with quiet():
        made = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert made is not None
    return made


class Format(NamedTuple):
    """An export format; `target` is its file or folder name, `has_weights` whether it contains the model's own ones."""

    target: str
    write: Callable[[Source, Path], None]
    load: Callable[[Path], Run]  # returns a module if the format has weights
    has_weights: bool = False


def write_safetensors(source: Source, path: Path) -> None:
    from safetensors.torch import save

    path.write_bytes(save(source.trained.model.state_dict(), {"format": "pt", **describe(source.trained)}))


def load_safetensors(path: Path) -> nn.Module:
    """Rebuild the model using only the file."""
    described, state_dict = read_safetensors(path)
    config = load_config(described["config"], [], source=str(path))
    model = build_model(config.model, len(json.loads(described["classes"])), input_size(config.data))
    model.load_state_dict(state_dict)
    return model.eval()


def write_hub(source: Source, path: Path) -> None:
    """Write a folder that contains config.json, model.safetensors and README.md, as timm does."""
    from timm.models import save_for_hf

    trained = source.trained
    labels, preprocessing = {"label_names": trained.classes}, timm_data_config(trained)
    save_for_hf(trained.model, str(path), model_config=labels, data_config=preprocessing, safe_serialization=True)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["model_args"].pop("num_classes", None)  # also stored at the top level, and transformers would pass it twice
    for key in OF_OTHER_WEIGHTS:
        config["pretrained_cfg"].pop(key, None)
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (path / "model.safetensors").unlink()  # timm's file has no metadata and often has mode 0600
    write_safetensors(source, path / "model.safetensors")
    (path / "README.md").write_text(model_card(trained), encoding="utf-8")


def load_hub(path: Path) -> nn.Module:
    import timm

    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


def write_torch_export(source: Source, path: Path) -> None:
    described = json.dumps(describe(source.trained))
    content = io.BytesIO()  # torch's own writer aborts the process if the disk is full
    torch.export.save(source.program, content, extra_files={"sasa_train.json": described})
    path.write_bytes(content.getbuffer())


def load_torch_export(path: Path) -> Run:
    return torch.export.load(path).module()


def write_onnx(source: Source, path: Path) -> None:
    made = onnx_program(source.program)
    made.model.metadata_props.update(describe(source.trained))
    made.save(path)


def load_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # the same number as PyTorch, for a fair comparison
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings and output of torch's exporters about their internals."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)


FORMATS: dict[str, Format] = {
    "safetensors": Format("model.safetensors", write_safetensors, load_safetensors, has_weights=True),
    "hub": Format("hub", write_hub, load_hub, has_weights=True),
    "onnx": Format("model.onnx", write_onnx, load_onnx),
    "torch_export": Format("model.pt2", write_torch_export, load_torch_export),
}
