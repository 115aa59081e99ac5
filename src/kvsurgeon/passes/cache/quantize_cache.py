"""Store keys and values as integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from kvsurgeon.cache.pairs import CachePair, find_cache_pairs
from kvsurgeon.cache.sizes import cache_size
from kvsurgeon.errors import UsageError
from kvsurgeon.fusion.quantized_operators import check_operators, quantize_operators, quantized_points, scales_of
from kvsurgeon.fusion.windowed_operators import with_all_rows
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.heads.hadamard import rotate_heads
from kvsurgeon.passes.cache.remove_cache import detach_cache, reattach_cache
from kvsurgeon.passes.contract import CACHE_TOKENS, Changed, Outcome, Subject, Unchanged
from kvsurgeon.rewrite.cache_removal import remove_cache


@dataclass(frozen=True, kw_only=True)
class QuantizeCache:
    """Store cached keys and values as integers, with a scale for each row of each head.

    Before: `past_key_values.{i}.key [batch_size, kv_heads, past_sequence_length, head_dim]` in floats. After: the same
    input as int8, or as uint8 with `head_dim / 2` bytes, and `past_key_values.{i}.key_scale [batch_size, kv_heads,
    past_sequence_length, 1]` in float32; the same for values and for the outputs. Each row is quantized once, when it
    enters the cache, and attention reads it from there. Not exact: the report states the accuracy loss.

    `hadamard` rotates queries, keys, values and outputs by a Hadamard matrix, which only changes what a row holds:
    large features are spread over all of a head, and 4 bits lose less.

    With `scales=per-channel` or `per-tensor` and a text, `GroupQueryAttention` quantizes by constants instead, without
    further inputs.

    Not supported: caches that `remove-cache` does not remove, an odd `head_dim` for 4 bits. With `hadamard`: keys or
    values that are changed between cache and product, such as by a rotary embedding, or that something else reads.

    Attributes:
        bits: Bits of an integer; 4 needs half the memory, and loses more.
        scales: A scale for each row of each head; or constants from a text, one for each feature or for all, that
            GroupQueryAttention takes.
        hadamard: Whether to rotate heads by a Hadamard matrix.
    """

    name: ClassVar[str] = "quantize-cache"
    exact: ClassVar[bool] = False  # its command measures the accuracy loss

    bits: Literal[8, 4] = 8
    scales: Literal["per-token", "per-channel", "per-tensor"] = "per-token"
    hadamard: bool = False

    def apply(self, subject: Subject) -> Outcome:
        """Quantize the cache of `subject.model`.

        Raises:
            UnsupportedError: The cache cannot be removed and injected again, or not quantized; the model is unchanged.
        """
        work = subject.with_model(subject.model)
        integers = next((pair.past for pair in find_cache_pairs(work.model.graph) if _is_integer(pair.past)), None)
        if integers is not None:
            return Unchanged(reason=f"`{integers.name}` holds integers already")
        if self.scales != "per-token":
            return self._with_constant_scales(subject)
        signature = detach_cache(work)
        if signature is None:
            return Unchanged(reason="the model has no cache: use inject")
        if not any(entry.kind in ("key", "value") for entry in signature.entries):
            return Unchanged(reason="the cache has no keys and values")
        pairs = [_rotate(work)] if self.hadamard else []
        injected = reattach_cache(work, signature, bits=self.bits)
        equal = partial(_equal_models, pairs, copy_model(work.model))
        sizes = _cache_bytes(subject.model), _cache_bytes(work.model)
        subject.model = work.model
        return replace(injected, exact=False, cache_bytes=sizes, equal_models=equal, proof=None)

    def _with_constant_scales(self, subject: Subject) -> Outcome:
        """Quantize a cache that operators update, by scales from a text."""
        check_operators(_rows_of_tokens(subject.model))
        if subject.text is None or self.hadamard:
            found = "none" if subject.text is None else "hadamard=true"
            raise UsageError(
                f"expected a text for scales={self.scales}, and no rotation, found {found}; give --text FILE"
            )
        from kvsurgeon.calibration import largest_features  # onnxruntime is slow to import

        before = with_all_rows(subject.model)
        largest = largest_features(before, subject.text, subject.folder)
        if self.scales == "per-tensor":
            largest = {name: features.max().reshape(1) for name, features in largest.items()}
        scales = {name: scales_of(features.reshape(-1), self.bits) for name, features in largest.items()}
        work = Subject(model=copy_model(subject.model))
        edits = quantize_operators(work.model, _rows_of_tokens(work.model), scales, self.bits)
        sizes = _cache_bytes(subject.model), _cache_bytes(work.model)
        equal = partial(_rounded_models, before, copy_model(work.model), scales, self.bits)
        subject.model = work.model
        return Changed(edits=edits, exact=False, cache_bytes=sizes, equal_models=equal)


def _rounded_models(
    before: ir.Model, result: ir.Model, scales: Mapping[str, np.ndarray], bits: int
) -> Sequence[tuple[ir.Model, ir.Model]]:
    """Return the model without a cache that rounds keys and values, and the one with a cache."""
    work = Subject(model=before)
    signature = detach_cache(work)
    assert signature is not None
    work.model = copy_model(work.model)
    with deep_recursion():
        return [(quantized_points(work.analysis(), signature, scales, bits), result)]


def _rotate(work: Subject) -> tuple[ir.Model, ir.Model]:
    """Rotate the heads of a model without a cache, and return the model before, and a copy of that after."""
    before = work.model
    with deep_recursion():
        rotate_heads(work.analysis_of_copy(keep_attention=False))
    work.changed()
    return before, copy_model(work.model)


def _rows_of_tokens(model: ir.Model) -> list[CachePair]:
    """Return the cache inputs and outputs without states of a fixed size."""
    return [pair for pair in find_cache_pairs(model.graph) if not pair.is_state]


def _is_integer(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer()


def _cache_bytes(model: ir.Model) -> int:
    """Return the bytes of the cache of a sequence of `CACHE_TOKENS` tokens."""
    return cache_size(model.graph).of(CACHE_TOKENS)


def _equal_models(pairs: Sequence[tuple[ir.Model, ir.Model]], result: ir.Model) -> Sequence[tuple[ir.Model, ir.Model]]:
    """Return pairs, and the model that quantizes the rows of a whole text in one call with the one with a cache."""
    removed = remove_cache(result)
    assert removed is not None
    return [*pairs, (removed.model, result)]
