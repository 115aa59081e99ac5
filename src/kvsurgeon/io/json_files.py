"""Read JSON of unknown origin: side files of models and entries of metadata."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from kvsurgeon.errors import InputError

LARGEST = 256 * 2**20  # bytes of a side file; larger files of such a name are weights
_DEEPEST = 100  # nested lists and objects, for code that recurses over them
_BRACKETS = (dict, list)


class _TooDeepError(ValueError):
    """JSON that is nested more deeply than any config."""

    def __init__(self) -> None:
        super().__init__(f"expected JSON of at most {_DEEPEST} nested levels, found more")


def parse_json(text: str, *, unique: bool = False) -> Any:
    """Return the content of a JSON text.

    Args:
        text: The text.
        unique: Whether an object that has a key twice is an error; else the last one counts.

    Raises:
        ValueError: It is not JSON, or is nested more deeply than any config.
    """
    try:
        found = json.loads(text, object_pairs_hook=_with_unique_keys if unique else None)
    except RecursionError:
        raise _TooDeepError from None
    layer, depth = [found] if isinstance(found, _BRACKETS) else [], 0
    while layer:
        depth += 1
        inner = (one for part in layer for one in (part.values() if isinstance(part, dict) else part))
        layer = [one for one in inner if isinstance(one, _BRACKETS)]
        if depth > _DEEPEST:
            raise _TooDeepError
    return found


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"expected each key of an object once, found {[key for key, _ in pairs]}")
    return found


def read_json(path: Path, *, unique: bool = False) -> Any:
    """Return the content of a JSON file; see `parse_json`.

    Raises:
        ValueError: It is not JSON.
        InputError: It cannot be read, is another kind of file, or is too large or nested too deeply.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"expected a regular file, found another kind of file at `{path}`")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST:
                raise InputError(f"expected at most {LARGEST:,} bytes of JSON, found {size:,} at `{path}`")
            text = file.read().decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror or error}") from error
    try:
        return parse_json(text, unique=unique)
    except _TooDeepError as error:
        raise InputError(f"{error} at `{path}`") from error
