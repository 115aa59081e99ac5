"""A second model, `prefill.onnx`, that computes the cache of a prompt with fewer nodes than the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kvsurgeon.errors import ParityError
from kvsurgeon.io.locate import PREFILL_FILE
from kvsurgeon.runtime.decoder import CachedDecoder
from kvsurgeon.runtime.session import Session, open_session
from kvsurgeon.runtime.tensors import Array

_TOKENS = 2  # of the text whose cache is compared
_NEAR = {"float32": 1e-4, "float64": 1e-4}  # of the largest number; 1e-2 for other floats
_EQUAL = 0.98  # of integers: rounding may give the next one


def open_prefill(decoder: CachedDecoder, folder: Path, **options: Any) -> Session | None:
    """Return the second model of a decoder; None if its folder has none with its inputs and its cache outputs alone.

    Args:
        decoder: The model with a cache.
        folder: Its folder.
        **options: Options of `open_session`.

    Raises:
        ParityError: It computes another cache than the model, as one of another model does.
    """
    path = folder / PREFILL_FILE
    if not path.is_file():
        return None
    found = open_session(path, **options)
    presents = {entry.present for entry in decoder.cache}
    if {one.name for one in found.outputs} != presents or _inputs(found) != _inputs(decoder.session):
        return None
    for name, (expected, given) in _caches(decoder, found).items():
        if not _is_near(expected, given):
            raise ParityError(
                f"expected `{path}` to compute the cache of the model, found another `{name}`; run separate-prefill on "
                "the model again, or remove the file"
            )
    return found


def _inputs(session: Session) -> set[tuple[str, str]]:
    return {(one.name, str(one.dtype)) for one in session.inputs}


def _caches(decoder: CachedDecoder, prefill: Session) -> dict[str, tuple[Array, Array]]:
    """Return each cached tensor after a short text, by the model and by the second one."""
    ones = np.ones((decoder.batch or 1, _TOKENS), np.int64)
    feeds = decoder.inputs.feeds(np.arange(_TOKENS)[None] * ones, ones)
    rows = []
    for session in (None, prefill):
        decoder.reset()
        decoder.advance(feeds, session)
        rows.append({entry.past.name: decoder.cached_rows(entry).copy() for entry in decoder.cache})
    decoder.reset()
    return {name: (rows[0][name], rows[1][name]) for name in rows[0]}


def _is_near(expected: Array, found: Array) -> bool:
    if expected.shape != found.shape:
        return False
    if expected.dtype.kind in "iu":
        return bool(np.mean(expected == found) >= _EQUAL)
    bound = _NEAR.get(str(expected.dtype), 1e-2) * np.abs(expected.astype(np.float64)).max(initial=0)
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    return bool((np.abs(expected - found) <= bound).all())
