"""The user's own code: which modules may be imported, and the objects in them that keys name by dotted names.

A module is imported only if a command line, a preset, the Python caller or an installed plugin names it. The config in
a checkpoint may name code, but never causes an import by itself.
"""

import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from sasa_train.refusal import ConfigError, shorten
from sasa_train.terminal import load_torch, some

PLUGINS = "sasa_train.plugins"  # the entry-point group in which installed packages name their modules
GIVEN = "given"  # stands for the module in the names of objects that no module has
OF_WORKER = "Original Traceback (most recent call last):\n"  # in an error that torch's DataLoader raises again

PACKAGE = Path(__file__).parents[1]
INSTALLED = {"site-packages", "dist-packages"}

_folders: set[str] = set()  # in which the user's modules are looked for
_named: set[str] = set()  # the modules that may be imported
_imported: dict[str, ModuleType] = {}
_files: dict[str, str] = {}  # module -> its entry in `imports`, of saved configs
_given: dict[str, Any] = {}  # dotted name -> object that a Python caller has passed


def module_name(entry: str) -> str:
    """Return the module of an entry in `imports`: a module's name, or the path of a .py file."""
    return Path(entry).stem if entry.endswith(".py") else entry


def module_of(target: str) -> str:
    """Return the module of a dotted name such as my_models.TinyNet."""
    return target.rpartition(".")[0]


def allow(modules: Iterable[str]) -> None:
    """Allow modules to be imported when an object in them is needed."""
    _named.update(modules)


def give(name: str, value: Any) -> None:
    """Let `load` return `value` for a dotted name in this process."""
    _given[name] = value


def given(name: str) -> Any:
    """Return the object that was given for a dotted name, or None."""
    return _given.get(name)


def use(entries: Sequence[str]) -> None:
    """Import the modules in `imports`, each once: modules by name, and .py files by path.

    Both are looked for from the working directory.

    Raises:
        ConfigError: a module or file is missing, or its own code fails; the message names the file and line.
    """
    allow(map(module_name, entries))
    for entry in entries:
        _import(entry, f"imports={entry}")


@functools.cache
def use_plugins() -> None:
    """Once, import the modules that installed packages announce in the entry-point group PLUGINS."""
    for plugin in entry_points(group=PLUGINS):
        allow([plugin.module])
        _import(plugin.module, f"the plugin {plugin.name} of {plugin.dist.name if plugin.dist else 'a package'}")


def check_named(entries: Sequence[str], targets: Sequence[str], source: str, later: Sequence[str] = ()) -> None:
    """Raise ConfigError if a saved config needs modules that nobody has named in this process.

    entries, targets: the config's `imports`, and the dotted names in its other keys; `source` is where it was saved.
    later: dotted names that may not be needed, so that their modules are not; `load` checks them when they are.
    """
    lost = [name for name in targets if module_of(name) == GIVEN and name not in _given]
    if lost:
        raise ConfigError(
            f"{source}: needs objects that a Python program has passed to train_model ({some(lost)}); pass them to "
            "train_model again, or train with functions and classes of a module that can be imported"
        )
    _files.update({module_name(entry): entry for entry in entries})
    of_targets = dict.fromkeys(map(module_of, targets))
    may_wait = set(map(module_of, later)) - set(of_targets)
    modules = dict.fromkeys([*(name for name in map(module_name, entries) if name not in may_wait), *of_targets])
    missing = [name for name in modules if name not in _named]
    missing = [name for name in missing if not any(module_of(given) == name for given in _given)]
    if missing:
        wanted = ",".join(_files.get(name, name) for name in missing)
        raise ConfigError(
            f"{source}: needs your own code ({some(missing)}), and a saved config runs none by itself; if you trust "
            f"it, add {shlex.quote(f'imports=[{wanted}]')}"
        )


def load(key: str, target: str) -> Callable[..., Any]:
    """Return the object with a dotted name, which `key` holds.

    Raises:
        ConfigError: its module has not been named, cannot be imported, or has no such object that can be called.
    """
    if target in _given:
        return _given[target]
    name, _, attribute = target.rpartition(".")
    if not name:
        raise ConfigError(f"{key}={shorten(target)} must be a dotted name, as in my_models.TinyNet")
    check_named((), [target], f"{key}={target}")
    module = _import(name, f"{key}={target}")
    found = getattr(module, attribute, None)
    if not callable(found):
        close = difflib.get_close_matches(attribute, [own for own in vars(module) if callable(vars(module)[own])], n=1)
        hint = f"; did you mean {name}.{close[0]}?" if close else ""
        what = "is not callable" if hasattr(module, attribute) else f"is not in {_file_of(module) or name}"
        raise ConfigError(f"{key}={target}: {attribute} {what}{hint}")
    return found


def digests(entries: Sequence[str], targets: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of the file of each module that a config names, by the module's name."""
    found = {}
    for name in dict.fromkeys([*map(module_name, entries), *map(module_of, targets)]):
        module = _imported.get(name) or sys.modules.get(name)
        if module is not None and (file := _file_of(module)) is not None:
            found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


def file_of(name: str) -> str:
    """Return the file of a module that was imported here, or its name if it has no file."""
    module = _imported.get(name) or sys.modules.get(name)
    return (_file_of(module) if module is not None else None) or name


@contextlib.contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Context manager that turns any error into a ConfigError that names `what` and the line of the user's code."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        refuse(what, error)


def refuse(what: str, error: BaseException) -> NoReturn:
    """Raise ConfigError for an error in the user's code."""
    place = own_line(error)
    reason = f"{type(error).__name__}: {shorten(error)}" if str(error) else type(error).__name__
    raise ConfigError(f"{what}: {place + ': ' if place else ''}{reason}") from error


def own_line(error: BaseException) -> str:
    """Return the innermost line of the user's code in an error's traceback as FILE:LINE in FUNCTION, or ''."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]
    return f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}" if own else ""


def own_traceback(error: BaseException) -> str:
    """Return an error's traceback from the first line of the user's code on, or '' if it has none.

    A data worker's error has it in its message.
    """
    frames = traceback.extract_tb(error.__traceback__)
    first = next((number for number, frame in enumerate(frames) if _is_own(frame.filename)), None)
    if first is None:
        lines = str(error).partition(OF_WORKER)[2].splitlines(keepends=True)
        while lines and not ((frame := re.match(r' *File "(.*)", line ', lines[0])) and _is_own(frame[1])):
            del lines[0]
    else:
        lines = traceback.format_list(frames[first:]) + traceback.format_exception_only(error)
    return "".join(["your own code failed:\n", *lines]).rstrip() if lines else ""


def place_of(part: Callable[..., Any]) -> str:
    """Return where a function or class is defined as FILE:LINE, or its module's name if that is unknown."""
    try:
        named = part if inspect.isroutine(part) or inspect.isclass(part) else type(part)
        return f"{inspect.getsourcefile(named)}:{inspect.getsourcelines(named)[1]}"
    except (OSError, TypeError):  # such as a partial, or a function of a compiled module
        return getattr(part, "__module__", None) or type(part).__name__


def imported() -> list[str]:
    """Return the names of the modules that were imported here, for `import_again`."""
    return list(_imported)


def import_again(names: Sequence[str]) -> None:
    """Import in a new process of this run, such as a data worker, what its parent has imported."""
    allow(names)
    for name in names:
        if name not in _imported:
            _imported[name] = importlib.import_module(name)


def _is_own(path: str) -> bool:
    """Whether a file is the user's: of a module that was named, or in the folders where such modules are looked for."""
    if path.startswith(str(PACKAGE) + os.sep):
        return False
    if any(_defined_in(value) == path for value in _given.values()):
        return True
    files = list(filter(None, map(_file_of, _imported.values())))
    if not INSTALLED.isdisjoint(Path(path).parts):
        folders = [file.removesuffix("__init__.py") for file in files]
        return any(path == folder or (folder.endswith(os.sep) and path.startswith(folder)) for folder in folders)
    beside = {os.path.dirname(file) for file in files}  # a data worker knows no other folder
    return any(os.path.abspath(path).startswith(folder + os.sep) for folder in _folders | beside)


def _defined_in(value: Any) -> str | None:
    value = inspect.unwrap(value)
    try:
        return inspect.getfile(value if inspect.isroutine(value) or isinstance(value, type) else type(value))
    except (TypeError, OSError):  # a builtin, or a class that a notebook defines
        return None


def _file_of(module: ModuleType) -> str | None:
    file = getattr(module, "__file__", None)
    return os.path.abspath(file) if file else None


def _import(entry: str, what: str) -> ModuleType:
    name = module_name(entry)
    if name not in _imported:
        load_torch()  # such modules import torch
        try:
            _imported[name] = _from_file(Path(entry), what) if entry.endswith(".py") else _by_name(entry, what)
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:
            refuse(what, error)
    return _imported[name]


def _by_name(name: str, what: str) -> ModuleType:
    _look_in(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"{what}: there is no module {error.name} in the working directory ({os.getcwd()}) or installed; give a "
            "module's name or the path of a .py file, as in imports=[./my_models.py]"
        ) from error


def _from_file(path: Path, what: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{what}: there is no such file; relative paths begin in {os.getcwd()}")
    name = path.stem
    if not name.isidentifier():
        raise ConfigError(f"{what}: a module's file must be named like a variable, as in my_models.py")
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        existing = sys.modules[name] if name in sys.modules else importlib.import_module(name)
        if _file_of(existing) == str(path.resolve()):
            return existing
        raise ConfigError(f"{what}: another module is named {name} ({_file_of(existing)}); rename the file")
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as the import statement does; data workers and timm look for it there
    _look_in(str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _look_in(folder: str) -> None:
    """Let imports find modules in a folder, but only those that no installed package has."""
    _folders.add(folder)
    if folder not in sys.path:
        sys.path.append(folder)
