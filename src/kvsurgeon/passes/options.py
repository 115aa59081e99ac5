"""A pass's fields as options: what they are called, what they mean, and how a text becomes their value."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union

from kvsurgeon.errors import UsageError

MOST = 2**31 - 1  # of anything, as runtimes count in 32 bits
TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One field of a pass, as its user sees it."""

    field: str  # as in Python: kv_heads
    type: Any
    required: bool
    default: Any = None
    help: str = ""

    @property
    def dim_names(self) -> str:
        """The name on a command line and in a pipeline's text: `kv-heads`."""
        return self.field.replace("_", "-")

    @property
    def is_flag(self) -> bool:
        """Whether the option is simply there or not."""
        return self.type is bool

    @property
    def kind(self) -> str:
        """What may be written, in a word or two: `int`, `a|b`, `int,int,...`."""
        return describe(self.type)

    def read(self, text: str) -> Any:
        """Return the value that `text` spells.

        Raises:
            UsageError: It spells no value of this option.
        """
        try:
            return convert(text, self.type)
        except ValueError as error:
            raise UsageError(f"option {self.dim_names}: expected {self.kind}, found {text!r}") from error


def options_of(pass_class: type) -> tuple[Option, ...]:
    """Return the options of a pass, in the order of its fields."""
    if not is_dataclass(pass_class):
        return ()
    types_by_name = typing.get_type_hints(pass_class)
    explained = {name: text for base in reversed(pass_class.__mro__) for name, text in _explained(base).items()}
    return tuple(
        Option(
            field=field.name,
            type=types_by_name[field.name],
            required=field.default is MISSING and field.default_factory is MISSING,
            default=_default(field),
            help=field.metadata.get("help", explained.get(field.name, "")),
        )
        for field in fields(pass_class)
        if field.init
    )


def check_count(option: str, found: int | None, least: int = 1, most: int = MOST) -> None:
    """Hold that an option, where it is given, is a number of things that there can be.

    Raises:
        UsageError: It is not.
    """
    if found is not None and not least <= found <= most:
        raise UsageError(f"option {option}: expected a number from {least} to {most}, found {found}")


def summary(pass_class: type) -> str:
    """Return the first line of a pass's docstring: what is true afterwards."""
    return (inspect.getdoc(pass_class) or "").partition("\n")[0]


def build(pass_class: Callable[..., Any], name: str, texts: Mapping[str, str]) -> Any:
    """Return the pass `name`, its options read from `texts`.

    Raises:
        UsageError: An option is unknown, missing, or has no such value.
    """
    known = {option.field: option for option in options_of(typing.cast(type, pass_class))}
    values = {}
    for dim_names, text in texts.items():
        option = known.get(dim_names.replace("-", "_"))
        if option is None:
            raise UsageError(f"pass {name} has no option {dim_names}; {_listed(known.values())}")
        values[option.field] = option.read(text)
    missing = [option.dim_names for option in known.values() if option.required and option.field not in values]
    if missing:
        raise UsageError(f"pass {name} needs {', '.join(missing)}: write {name}{{{missing[0]}=...}}")
    try:
        return pass_class(**values)
    except ValueError as error:
        raise UsageError(f"pass {name}: {error}") from error


def convert(text: str, wanted: Any) -> Any:
    """Return `text` as a value of the type `wanted`, or raise ValueError."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return _either(text, inner)
    if origin is Literal:
        return _one_of(text, inner)
    if origin is tuple:
        return _several(text, inner)
    if wanted is bool:
        return _one_of(text.lower(), TRUTHS, TRUTHS)
    if wanted in (int, float, str, Path):
        return wanted(text)
    raise ValueError(f"{wanted} can be given in Python only")


def describe(wanted: Any) -> str:
    """Return in a word or two what may be written for a value of the type `wanted`."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return "|".join("none" if one is type(None) else describe(one) for one in inner)
    if origin is Literal:
        return "|".join(str(choice) for choice in inner)
    if origin is tuple:
        if len(inner) > 1 and len(set(inner)) == 1:
            return f"{len(inner)} of {describe(inner[0])}"
        return ",".join("..." if one is Ellipsis else describe(one) for one in inner)
    return {bool: "true|false", str: "text", Path: "path"}.get(wanted, getattr(wanted, "__name__", str(wanted)))


def _either(text: str, choices: tuple[Any, ...]) -> Any:
    if type(None) in choices and text.lower() == "none":
        return None
    for choice in choices:
        try:
            return convert(text, choice)
        except (ValueError, TypeError):
            continue
    raise ValueError(text)


def _one_of(text: str, choices: typing.Iterable[Any], meaning: Mapping[str, Any] | None = None) -> Any:
    meaning = meaning or {str(choice): choice for choice in choices}
    if text not in meaning:
        raise ValueError(text)
    return meaning[text]


def _several(text: str, inner: tuple[Any, ...]) -> tuple[Any, ...]:
    parts = text.split(",") if text else []
    if len(inner) == 2 and inner[1] is Ellipsis:
        inner = (inner[0],) * len(parts)
    if len(parts) != len(inner):
        raise ValueError(text)
    return tuple(convert(part.strip(), one) for part, one in zip(parts, inner, strict=True))


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return None if field.default_factory is MISSING else field.default_factory()


def _explained(pass_class: type) -> dict[str, str]:
    """Return what the `Attributes:` (or `Args:`) section of a class's own docstring says of each name."""
    docstring = inspect.cleandoc(pass_class.__doc__ or "")
    section = re.search(r"^(?:Attributes|Args):\n((?:[ \t]+.*\n?|\n)+)", docstring, re.MULTILINE)
    if section is None:
        return {}
    entries = re.findall(r"^ {4}(\w+)(?: \([^)]*\))?: (.*(?:\n {5,}.*)*)", section.group(1), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _listed(options: typing.Iterable[Option]) -> str:
    dim_names = [f"{option.dim_names} ({option.kind})" for option in options]
    return f"known: {', '.join(dim_names)}" if dim_names else "it has none"
