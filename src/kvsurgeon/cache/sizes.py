"""The size of a cache in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import onnx_ir as ir

from kvsurgeon.cache.layout import declared_shape
from kvsurgeon.cache.pairs import CachePair, find_cache_pairs
from kvsurgeon.cache.states import find_recurrent_states


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """The bytes of the cache of one sequence.

    Attributes:
        per_token: Bytes that one more token adds.
        fixed: Bytes that do not depend on the number of tokens: buffers and states of a fixed size.
    """

    per_token: int
    fixed: int

    def of(self, tokens: int) -> int:
        """Return the bytes of the cache of a sequence of so many tokens."""
        return self.fixed + self.per_token * tokens


def cache_size(graph: ir.Graph) -> CacheSize:
    """Return the size of the cache of a model; 0 without a cache.

    A window is counted with all its rows.

    Raises:
        UnsupportedError: The cache cannot be read.
    """
    size = CacheSize(per_token=0, fixed=sum(_bytes(pair.past, None) for pair in find_recurrent_states(graph)))
    for pair in find_cache_pairs(graph):
        row, rows = bytes_per_row(pair), _fixed_rows(pair)
        if rows is None:
            size = replace(size, per_token=size.per_token + row)
        else:
            size = replace(size, fixed=size.fixed + row * rows)
    return size


def bytes_per_row(pair: CachePair) -> int:
    """Return the bytes of one row of a cached tensor, for one sequence."""
    return _bytes(pair.past, pair.axis)


def _fixed_rows(pair: CachePair) -> int | None:
    """Return the declared number of rows of a tensor; None if each token adds one."""
    size = declared_shape(pair.past)[pair.axis]
    if isinstance(size, int):
        return size
    return None if pair.window is None else pair.window.most


def _bytes(past: ir.Value, axis: int | None) -> int:
    sizes = (size for place, size in enumerate(declared_shape(past)) if place != axis)
    bits = (past.dtype or ir.DataType.FLOAT).bitwidth
    return math.prod(size for size in sizes if isinstance(size, int)) * bits // 8
