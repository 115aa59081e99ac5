"""The public names of the package: those that it provides, and the types of what its functions return."""

from __future__ import annotations

import inspect
import re
import typing
from dataclasses import fields, is_dataclass
from typing import Any

import kvsurgeon

_KINDS: dict[Any, str] = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}


def public_names() -> dict[str, Any]:
    """Return functions and classes by their names in the docs."""
    found = {name: getattr(kvsurgeon, name) for name in kvsurgeon.__all__}
    provided = {f"kvsurgeon.{name}": value for name, value in found.items() if not isinstance(value, str)}
    functions = [value for value in provided.values() if inspect.isfunction(value)]
    results = {one.__name__: one for function in functions for one in _classes(_returned(function))}
    return provided | {name: one for name, one in sorted(results.items()) if one not in provided.values()}


def undocumented(value: Any) -> set[str]:
    """Return the parameters of a function, or the fields of a dataclass, that its docstring lacks or invents."""
    if inspect.isfunction(value):
        expected = {_KINDS.get(one.kind, "") + one.name for one in inspect.signature(value).parameters.values()}
        return expected ^ set(section(value, "Args"))
    expected = {one.name for one in fields(value) if not one.name.startswith("_")} if is_dataclass(value) else set()
    return expected - set(section(value, "Attributes"))


def section(value: Any, name: str) -> list[str]:
    """Return the names that a section of a docstring describes."""
    match = re.search(rf"^{name}:\n((?:    .*\n?|\n)*)", inspect.getdoc(value) or "", re.MULTILINE)
    return re.findall(r"^    (\*{0,2}\w+): ", match[1], re.MULTILINE) if match else []


def _returned(function: Any) -> Any:
    """Return the type of what a function returns; its name if only type checkers import it."""
    annotation = function.__annotations__["return"]
    try:
        return eval(annotation, function.__globals__)
    except NameError:
        return annotation


def _classes(annotation: Any) -> list[type]:
    """Return the classes of this package in a type."""
    inner = [one for argument in typing.get_args(annotation) for one in _classes(argument)]
    is_own = inspect.isclass(annotation) and annotation.__module__.startswith("kvsurgeon.")
    return [annotation, *inner] if is_own else inner
