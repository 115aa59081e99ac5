"""From options to a plan: which cache mode, which tensors, and where each length is read at run time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir
import sympy

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.cache.layout import Layout
from kvsurgeon.cache.length_inputs import Count
from kvsurgeon.dataflow.input_roles import InputRole, find_positions
from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.proof.proof import Proof
from kvsurgeon.rewrite.cache_entries import CacheNames, CacheTensor, find_entries
from kvsurgeon.rewrite.cache_modes.dynamic import DynamicCache
from kvsurgeon.rewrite.cache_modes.mode import CacheMode
from kvsurgeon.rewrite.cache_modes.new_tokens import NewTokensCache
from kvsurgeon.rewrite.cache_modes.static import StaticCache
from kvsurgeon.rewrite.lengths import Source
from kvsurgeon.symbolic.dimension import CAPACITY, MAX, NEW, PAST, Dimension
from kvsurgeon.symbolic.sequence_axes import Length

PAST_LENGTH = "past_sequence_length"  # name of the input that gives it

_COUNTS: dict[str, tuple[Count, ...]] = {  # the default first
    "dynamic": ("shape",),
    "static": ("input", "positions", "mask"),
    "new-tokens": ("shape", "input", "positions"),
}


class Options(Protocol):
    """What a plan is made from; see `kvsurgeon.passes.cache.inject.Inject`."""

    @property
    def past(self) -> str: ...  # noqa: D102
    @property
    def present(self) -> str: ...  # noqa: D102
    @property
    def cache(self) -> str: ...  # noqa: D102
    @property
    def past_length(self) -> Count | None: ...  # noqa: D102
    @property
    def max_length(self) -> int | None: ...  # noqa: D102
    @property
    def key_layout(self) -> Layout: ...  # noqa: D102
    @property
    def value_layout(self) -> Layout: ...  # noqa: D102
    @property
    def cache_dtype(self) -> str | None: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an injection is to make."""

    cache_mode: CacheMode
    count: Count
    entries: Sequence[CacheTensor]


def plan_cache(options: Options, analysis: Analysis, proof: Proof) -> Plan:
    """Return what the options ask for, if it can be had of this model.

    Raises:
        UsageError: Two options do not go together.
        UnsupportedError: The model lacks what they need.
    """
    counts = _COUNTS[options.cache]
    count = options.past_length or counts[0]
    if count not in counts:
        raise UsageError(f"{options.cache}: expected past-length {' or '.join(counts)}, found {count}")
    if options.max_length is not None and options.cache != "static":
        raise UsageError(f"{options.cache}: expected no max-length, found {options.max_length}; fix-shapes gives one")
    wanted, longest = options.max_length, proof.max_length
    if wanted is not None and longest is not None and wanted > longest:
        raise UnsupportedError(
            "the model cannot be run on as many tokens as the cache is to hold", at=analysis.inputs[0].value.name,
            expected=f"max-length of at most {longest}", found=str(wanted),
        )  # fmt: skip
    if wanted is not None and isinstance(analysis.length, int) and wanted < analysis.length:
        raise UnsupportedError(
            "an export of fixed length is run on no fewer tokens than it has, and so the cache must hold as many",
            at=analysis.inputs[0].value.name, expected=f"max-length {analysis.length}", found=str(wanted),
        )  # fmt: skip
    dtype = None if options.cache_dtype is None else ir.DataType[options.cache_dtype.upper()]
    naming = CacheNames(
        past=options.past, present=options.present, dtype=dtype,
        key_layout=options.key_layout, value_layout=options.value_layout,
    )  # fmt: skip
    cache_mode = _cache_mode(options, count, analysis.length)
    if analysis.states and cache_mode.past is CAPACITY:
        raise UnsupportedError(
            "rows that need not be filled stand before the tokens, and would be taken for tokens outside attention",
            at=analysis.states[0].value.name, expected="tokens that see others in attention only",
            hint="past-length=shape, or in-place",
        )  # fmt: skip
    return Plan(cache_mode=cache_mode, count=count, entries=find_entries(analysis.heads, analysis.states, naming))


def _cache_mode(options: Options, count: Count, length: Dimension) -> CacheMode:
    if options.cache == "static":
        longest = length if isinstance(length, int) else MAX  # what an export of fixed length can be run on
        return StaticCache(room=options.max_length or longest, cut_short=count == "mask")
    if options.cache == "dynamic":
        return DynamicCache()
    if count != "shape" and isinstance(length, int):
        raise UnsupportedError(
            "rows that need not be filled stand before the tokens, and context that an export fixed has no such rows",
            expected="an export of any length", found=f"one of {length} tokens", hint="past-length=shape, or in-place",
        )  # fmt: skip
    return NewTokensCache(past=PAST if count == "shape" else CAPACITY)


def find_sources(plan: Plan, analysis: Analysis, editor: Editor, past: ir.Value) -> dict[sympy.Symbol, Source]:
    """Return where each length can be read at run time, having added the input that gives one."""
    held = Source(value=past, axis=plan.entries[0].axis)
    sources: dict[sympy.Symbol, Source] = {}
    if isinstance(plan.cache_mode.past, sympy.Symbol):
        sources[plan.cache_mode.past] = held
    for given in sorted(analysis.inputs, key=lambda given: not given.is_token):
        for axis, size in enumerate(given.dimensions):
            if axis not in given.lengths and not isinstance(size, int):
                sources.setdefault(size, Source(value=given.value, axis=axis))
            elif axis in given.lengths and given.is_token:
                sources.setdefault(NEW, Source(value=given.value, axis=axis))
    if plan.count != "shape":
        sources[PAST] = Source(value=_COUNTERS[plan.count](analysis, editor, sources[NEW]))
    return sources


def _by_input(analysis: Analysis, editor: Editor, new: Source) -> ir.Value:
    """An input of its own, int64 [1]: what every model can have, and what no mask or position can be taken for."""
    graph = analysis.model.graph
    if any(value.name == PAST_LENGTH for value in (*graph.inputs, *graph.outputs)):
        raise UnsupportedError("the model already has an input or output of that name", at=PAST_LENGTH)
    editor.release_name(PAST_LENGTH)
    given = ir.Value(name=PAST_LENGTH, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    graph.inputs.append(given)
    return given


def _by_positions(analysis: Analysis, editor: Editor, new: Source) -> ir.Value:
    """The position of the first new token of the first row: right where no row is padded on the left."""
    given = _only(find_positions(analysis.inputs), "an input of positions")
    flat = editor.node("Reshape", [given.value, editor.constant([-1])], name="positions.flat", dtype=given.value.dtype)
    return editor.node(
        "Gather", [flat, editor.constant([0])], name="position.first", dtype=given.value.dtype, shape=[1]
    )


def _by_mask(analysis: Analysis, editor: Editor, new: Source) -> ir.Value:
    """The length of the mask, which is given for all tokens so far, less the new ones."""
    masks = [given for given in analysis.inputs if set(given.lengths.values()) == {Length.TOTAL}]
    given = _only(masks, "an attention mask given for all tokens so far")
    axis = next(iter(given.lengths))
    sizes = []
    for value, place in ((given.value, axis), (new.value, new.axis)):
        shape = editor.node("Shape", [value], name=f"{value.name}_shape", dtype=ir.DataType.INT64)
        index = editor.constant([place])
        sizes.append(editor.node("Gather", [shape, index], name="length", dtype=ir.DataType.INT64, shape=[1]))
    return editor.node("Sub", sizes, name="past_length", dtype=ir.DataType.INT64, shape=[1])


def _only(found: Sequence[InputRole], expected: str) -> InputRole:
    if len(found) != 1:
        names = ", ".join(given.value.name or "" for given in found) or "none"
        raise UnsupportedError(
            "the number of past tokens cannot be read", expected=expected, found=names, hint="past-length=input"
        )
    return found[0]


_COUNTERS = {"input": _by_input, "positions": _by_positions, "mask": _by_mask}
