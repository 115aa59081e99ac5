"""Passes that Python files define, by name, as those of installed packages are."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from kvsurgeon.errors import InputError, PluginError, describe_exception
from kvsurgeon.interop.functions import as_pass_class
from kvsurgeon.plugins import Catalogue
from kvsurgeon.workflow.registry import PASSES


def passes_with(files: Iterable[str | Path]) -> Catalogue[type[Any]]:
    """Return all passes, and those that Python files define: their pass classes, and their functions on graphs.

    Raises:
        InputError: A file does not exist.
        PluginError: A file cannot be imported, or defines no pass.
    """
    return replace(PASSES, further=tuple(one for file in files for one in _defined(Path(file))))


def _defined(path: Path) -> list[tuple[str, str, str]]:
    """Return name, reference and origin of each pass of a file."""
    module = _import(path)
    own = [found for found in vars(module).values() if getattr(found, "__module__", None) == module.__name__]
    passes = [(name, f"{module.__name__}:{found.__name__}", str(path)) for found in own for name in _pass_name(found)]
    if not passes:
        raise PluginError(
            f"expected a pass: a class with `name` and `apply`, or a function whose first parameter is annotated as "
            f"gs.Graph, ir.Model or Subject; found none - at `{path}`"
        )
    return passes


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"expected a Python file of passes, found none - at `{path}`")
    spec = spec_from_file_location(f"kvsurgeon_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise PluginError(f"expected a Python file with the suffix .py - at `{path}`")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks up its annotations, and `Plugin.load` the pass
    try:
        with redirect_stdout(sys.stderr):  # stdout is for results
            spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # such as SystemExit
        raise PluginError(f"`{path}` cannot be imported: {describe_exception(error)}") from error
    return module


def _pass_name(found: Any) -> Iterator[str]:
    """Yield the name of an object that is a pass."""
    if inspect.isclass(found) and isinstance(getattr(found, "name", None), str) and hasattr(found, "apply"):
        yield str(found.name)  # type: ignore[attr-defined]
    if inspect.isfunction(found):
        try:
            yield as_pass_class(found).name
        except (PluginError, ValueError):  # a function of another kind; one without parameters
            return
