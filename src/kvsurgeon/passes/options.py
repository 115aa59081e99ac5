"""Options of a pass: its fields, their help texts, and how a text is converted to a value."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union

from kvsurgeon.errors import UsageError, did_you_mean

MAX_COUNT = 2**31 - 1  # runtimes use 32-bit counts
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a pass.

    Attributes:
        field: Name of the field, such as `kv_heads`.
        type: Type of the field.
        required: Whether it has no default.
        default: Value if it is not given.
        help: Help text, from the docstring of the pass.
    """

    field: str
    type: Any
    required: bool
    default: Any = None
    help: str = ""

    @property
    def name(self) -> str:
        """Name on the command line and in a pipeline, such as `kv-heads`."""
        return self.field.replace("_", "-")

    @property
    def is_flag(self) -> bool:
        """Whether the option is a boolean."""
        return self.type is bool

    @property
    def kind(self) -> str:
        """Description of the allowed values, such as `int`, `a|b` or `int,int,...`."""
        return describe(self.type)

    def read(self, text: str) -> Any:
        """Return the value of a text.

        Raises:
            UsageError: The text is no value of this option.
        """
        try:
            return convert(text, self.type)
        except ValueError as error:
            raise UsageError(f"option {self.name}: expected {self.kind}, found {text!r}") from error


def options_of(pass_class: type) -> tuple[Option, ...]:
    """Return the options of a pass, in the order of its fields."""
    if not is_dataclass(pass_class):
        return ()
    hints = typing.get_type_hints(pass_class)
    help_texts = {name: text for base in reversed(pass_class.__mro__) for name, text in _help_texts(base).items()}
    return tuple(
        Option(
            field=field.name,
            type=hints[field.name],
            required=field.default is MISSING and field.default_factory is MISSING,
            default=_default(field),
            help=field.metadata.get("help", help_texts.get(field.name, "")),
        )
        for field in fields(pass_class)
        if field.init
    )


def texts_of(one: Any) -> dict[str, str]:
    """Return the options of a pass as texts by name, from which `build` makes an equal pass."""
    return {option.name: text_of(getattr(one, option.field)) for option in options_of(type(one))}


def check_count(option: str, found: int | None, least: int = 1, most: int = MAX_COUNT) -> None:
    """Check that an option, if given, is a number in a range.

    Raises:
        UsageError: It is not.
    """
    if found is not None and not least <= found <= most:
        raise UsageError(f"option {option}: expected a number from {least} to {most}, found {found}")


def summary(pass_class: type) -> str:
    """Return the first line of the docstring of a pass."""
    return (inspect.getdoc(pass_class) or "").partition("\n")[0]


def build(pass_class: Callable[..., Any], name: str, texts: Mapping[str, str]) -> Any:
    """Return a pass with options.

    Args:
        pass_class: The class of the pass.
        name: Name of the pass, for messages.
        texts: Texts of the options, by name.

    Raises:
        UsageError: An option is unknown, missing, or has an invalid value.
    """
    found = ((_find(pass_class, name, given), text) for given, text in texts.items())
    return make(pass_class, name, {option.field: option.read(text) for option, text in found})


def make(pass_class: Callable[..., Any], name: str, values: Mapping[str, Any]) -> Any:
    """Return a pass with the values of its fields.

    Raises:
        UsageError: An option is unknown, missing, or has an invalid value.
    """
    for given, value in values.items():
        option = _find(pass_class, name, given)
        if not is_value(value, option.type):
            raise UsageError(f"option {option.name}: expected {option.kind}, found {value!r}")
    options = options_of(typing.cast(type, pass_class))
    missing = [option.name for option in options if option.required and option.field not in values]
    if missing:
        raise UsageError(f"pass {name} requires {', '.join(missing)}: write {name}{{{missing[0]}=...}}")
    try:
        return pass_class(**values)
    except ValueError as error:
        raise UsageError(f"pass {name}: {error}") from error


def is_value(value: Any, wanted: Any) -> bool:
    """Whether a value is one of a type of options; other types are not checked.

    >>> is_value(("Add", "Mul"), tuple[str, ...]), is_value(True, int), is_value("static", Literal["dynamic"])
    (True, False, False)
    """
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return any(is_value(value, one) for one in inner)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin is tuple:
        inner = (inner[0],) * len(value) if inner[1:] == (Ellipsis,) and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(is_value, value, inner))
    if wanted in (int, float):
        return isinstance(value, (int, wanted)) and not isinstance(value, bool)
    if wanted is Path:
        return isinstance(value, str | Path)
    return isinstance(value, wanted) if wanted in (bool, str, types.NoneType) else True


def convert(text: str, wanted: Any) -> Any:
    """Return a text as a value of a type.

    Raises:
        ValueError: It is none.
    """
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return _to_union(text, inner)
    if origin is tuple:
        return _to_tuple(text, inner)
    if origin is Literal:
        return _lookup(text, {str(choice): choice for choice in inner})
    if wanted is bool:
        return _lookup(text.lower(), BOOLEANS)
    if wanted in (int, float, str, Path):
        return wanted(text)
    raise ValueError(f"{wanted} is available in Python only")


def text_of(value: Any) -> str:
    """Return the text that `convert` converts to a value.

    >>> text_of((1, 2)), text_of(None), text_of(True)
    ('1,2', 'none', 'true')
    """
    if isinstance(value, tuple):
        return ",".join(map(text_of, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def describe(wanted: Any) -> str:
    """Return a short description of the texts of a type."""
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


def _lookup(text: str, choices: Mapping[str, Any]) -> Any:
    if text not in choices:
        raise ValueError(text)
    return choices[text]


def _to_union(text: str, choices: tuple[Any, ...]) -> Any:
    if type(None) in choices and text.lower() == "none":
        return None
    for choice in choices:
        try:
            return convert(text, choice)
        except (ValueError, TypeError):
            continue
    raise ValueError(text)


def _to_tuple(text: str, inner: tuple[Any, ...]) -> tuple[Any, ...]:
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


def _help_texts(pass_class: type) -> dict[str, str]:
    """Return the entries of the section `Attributes` (or `Args`) in the docstring of a class, by name."""
    docstring = inspect.cleandoc(pass_class.__doc__ or "")
    section = re.search(r"^(?:Attributes|Args):\n((?:[ \t]+.*\n?|\n)+)", docstring, re.MULTILINE)
    if section is None:
        return {}
    entries = re.findall(r"^ {4}(\w+)(?: \([^)]*\))?: (.*(?:\n {5,}.*)*)", section.group(1), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _find(pass_class: Callable[..., Any], name: str, given: str) -> Option:
    """Return the option of a pass by its name or field.

    Raises:
        UsageError: There is none.
    """
    options = {option.name: option for option in options_of(typing.cast(type, pass_class))}
    found = options.get(given.replace("_", "-"))
    if found is None:
        hint = did_you_mean(given, options) if options else "it has none"
        raise UsageError(f"pass {name} has no option {given}; {hint}")
    return found
