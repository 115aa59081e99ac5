"""Store keys and values as integers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import onnx_ir as ir

from kvsurgeon.cache.layout import declared_shape
from kvsurgeon.cache.pairs import CachePair, find_cache_pairs
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.passes.cache.remove_cache import detach_cache, reattach_cache
from kvsurgeon.passes.contract import Outcome, Subject, Unchanged
from kvsurgeon.rewrite.cache_removal import remove_cache


@dataclass(frozen=True, kw_only=True)
class QuantizeCache:
    """Store cached keys and values as integers, with a scale for each row of each head.

    Before: `past_key_values.{i}.key [batch_size, kv_heads, past_sequence_length, head_dim]` in floats. After: the same
    input as int8, or as uint8 with `head_dim / 2` bytes, and `past_key_values.{i}.key_scale [batch_size, kv_heads,
    past_sequence_length, 1]` in float32; the same for values and for the outputs. Each row is quantized once, when it
    enters the cache, and attention reads it from there. Not exact: the report states the accuracy loss.

    Not supported: caches that `remove-cache` does not remove, an odd `head_dim` for 4 bits.

    Attributes:
        bits: Bits of an integer; 4 needs half the memory, and loses more.
    """

    name: ClassVar[str] = "quantize-cache"
    exact: ClassVar[bool] = False  # its command measures the accuracy loss

    bits: Literal[8, 4] = 8

    def apply(self, subject: Subject) -> Outcome:
        """Quantize the cache of `subject.model`.

        Raises:
            UnsupportedError: The cache cannot be removed and injected again, or not quantized; the model is unchanged.
        """
        work = Subject(model=subject.model, folder=subject.folder, config=subject.config)
        integers = next((pair.past for pair in find_cache_pairs(work.model.graph) if _is_integer(pair.past)), None)
        if integers is not None:
            return Unchanged(reason=f"`{integers.name}` holds integers already")
        signature = detach_cache(work)
        if signature is None:
            return Unchanged(reason="the model has no cache: use inject")
        injected = reattach_cache(work, signature, bits=self.bits)
        before, after = (_bytes_per_token(model.graph) for model in (subject.model, work.model))
        size = f"a token of one sequence takes {after} bytes in the cache, before {before}"
        equal = partial(_equal_models, copy_model(work.model))
        subject.model = work.model
        return replace(injected, notes=(*injected.notes, size), exact=False, equal_models=equal, proof=None)


def _is_integer(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer()


def _bytes_per_token(graph: ir.Graph) -> int:
    """Return the bytes that one more token of one sequence adds to the cache."""
    return sum(_bytes_per_row(pair) for pair in find_cache_pairs(graph) if pair.cache_mode != "last-rows")


def _bytes_per_row(pair: CachePair) -> int:
    sizes = (size for axis, size in enumerate(declared_shape(pair.past)) if axis != pair.axis)
    bits = (pair.past.dtype or ir.DataType.FLOAT).bitwidth
    return math.prod(size for size in sizes if isinstance(size, int)) * bits // 8


def _equal_models(result: ir.Model) -> tuple[ir.Model, ir.Model]:
    """Return the model that quantizes the rows of a whole text in one call, and the one with a cache."""
    removed = remove_cache(result)
    assert removed is not None
    return removed.model, result
