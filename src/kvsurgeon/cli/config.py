"""Options of a command in a YAML file: `--config` and `--save-config`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kvsurgeon.errors import InputError, UsageError, did_you_mean
from kvsurgeon.passes.options import text_of

_OF_ONE_RUN = ("model", "output", "config", "save_config")  # not in files
_GIVEN = ("COMMANDLINE", "DEFAULT_MAP")  # names of the sources of options, in click


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Make the options of a file the defaults of a command.

    Raises:
        InputError: The file cannot be read, or is not YAML.
        UsageError: It has another form, or an option that the command does not have.
    """
    if path is None or context.resilient_parsing:
        return path
    known = {str(one.name).replace("_", "-"): one for one in context.command.params if one.name not in _OF_ONE_RUN}
    options = _load(path)
    for name in options:
        if name not in known:
            raise UsageError(f"unknown option {name!r}; {did_you_mean(name, known)} - at `{path}`")
    context.default_map = {
        name.replace("-", "_"): _texts(value) if known[name].multiple else _text(value)
        for name, value in options.items()
    }
    return path


Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Read options from a YAML file.", is_eager=True, callback=_read)
]


def _check(path: Path | None) -> Path | None:
    if path is not None:
        from kvsurgeon.io.atomic_write import check_new_file

        check_new_file(path, ".yaml", ".yml")
    return path


SaveConfig = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the options to a YAML file.", callback=_check)
]


def save_config(context: typer.Context, path: Path | None) -> None:
    """Write the options that are given, in a file or as arguments, to another file, if there is one.

    Raises:
        UsageError: The file cannot be written.
    """
    if path is None:
        return
    import yaml

    from kvsurgeon.io.atomic_write import atomic_open

    given = {
        name.replace("_", "-"): _plain(value)
        for name, value in context.params.items()
        if name not in _OF_ONE_RUN and getattr(context.get_parameter_source(name), "name", "") in _GIVEN
    }
    with atomic_open(path) as file:
        file.write(yaml.safe_dump(given, sort_keys=False).encode())


def _load(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"expected a YAML file of options, found none ({error}) - at `{path}`") from error
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise UsageError(f"expected options such as `cache: static`, found {found!r} - at `{path}`")
    return found


def _plain(value: Any) -> Any:
    """Return a value of an option as YAML has it."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, bool | int | float) else str(value)


def _texts(value: Any) -> list[str]:
    """Return the texts of an option that may be repeated; passes are names, or mappings of a name to options."""
    values = value if isinstance(value, list) else [value]
    return [_pass_text(one) if isinstance(one, Mapping) else text_of(one) for one in values]


def _text(value: Any) -> str:
    return text_of(tuple(value) if isinstance(value, list) else value)


def _pass_text(one: Mapping[Any, Any]) -> str:
    ((name, options),) = one.items() if len(one) == 1 else [(None, None)]
    if not isinstance(options, Mapping):
        raise UsageError(f"expected a pass such as `inject: {{cache: static}}`, found {one!r}")
    given = ", ".join(f'{key}="{_text(value)}"' for key, value in options.items())
    return f"{name}{{{given}}}"
