"""Plan of an injection: cache mode, cached tensors, and the source of each length at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import sympy

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.cache.layout import DEFAULT_LAYOUT
from kvsurgeon.cache.length_inputs import PastLength
from kvsurgeon.cache.pairs import CacheMode
from kvsurgeon.dataflow.input_roles import InputRole, find_positions
from kvsurgeon.errors import Code, UnsupportedError, UsageError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.proof.proof import Proof
from kvsurgeon.resizing.lengths import INT64, LengthSource, sources_of
from kvsurgeon.resizing.windows import NO_WINDOWS, Windows
from kvsurgeon.rewrite.by_sequence.token_rows import find_token_rows
from kvsurgeon.rewrite.cache_options import CacheOptions
from kvsurgeon.rewrite.cache_tensors import CacheTensor, RecurrentTensor, find_cache_tensors, find_recurrent_tensors
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dim_names import dim_names
from kvsurgeon.symbolic.dimension import CAPACITY, MAX, NEW, PAST, TOTAL, Dimension
from kvsurgeon.symbolic.sequence_axes import Length

PAST_LENGTH = "past_sequence_length"  # name of the separate input

_PAST_LENGTHS: dict[CacheMode, tuple[PastLength, ...]] = {  # the default first
    "dynamic": ("shape",),
    "static": ("input", "per-sequence", "positions", "mask"),
    "new-tokens": ("shape", "input", "positions"),
}


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Plan of an injection.

    Attributes:
        cache_mode: Content of the cache outputs.
        past_length: Source of the number of past tokens.
        token_rows: Input for the row of each new token, int64 [batch, sequence], if past lengths are per sequence.
        tensors: The cached tensors.
        recurrences: The recurrent states.
        past: Rows of a cache input.
        present: Rows of a cache output.
        total: Rows that attention reads: the length for which context is computed.
        limit: Largest total length at which the context is proved, if there is one. Unfilled rows that come first read
            context after the end of the text, so with them it is that of the tables too.
        max_length: Largest total length that the model supports, if there is one.
    """

    cache_mode: CacheMode
    past_length: PastLength
    token_rows: ir.Value | None
    tensors: Sequence[CacheTensor]
    recurrences: Sequence[RecurrentTensor]
    past: Dimension
    present: Dimension
    total: Dimension
    limit: int | None
    max_length: int | None


def plan_cache(
    options: CacheOptions, analysis: Analysis, proof: Proof, bits: int | None = None, windows: Windows = NO_WINDOWS
) -> CachePlan:
    """Return the plan for some options, with keys and values as integers of some bits, if any are given.

    Of the attention sites with these indices only the rows of a window are cached.

    Raises:
        UsageError: Two options exclude each other.
        UnsupportedError: The model does not support them.
    """
    past_length = _check_options(options, analysis, proof)
    if not analysis.sites and options.cache != "dynamic":
        raise UnsupportedError(
            "the model has no attention, so its cache has no rows to write into", code=Code.NO_ATTENTION,
            at=analysis.inputs[0].value.name, expected="cache=dynamic", found=f"cache={options.cache}",
        )  # fmt: skip
    past, present, total = _rows(options, past_length, analysis.length)
    growing = [point for point in analysis.states if analysis.rows_of(point.value) is None]
    if growing and past is CAPACITY:
        raise UnsupportedError(
            "unfilled rows come before the tokens, so a sequence state would read them as tokens",
            code=Code.MIXES_TOKENS, at=growing[0].value.name, expected="attention only",
            hint="use past-length=shape or cache=static",
        )  # fmt: skip
    tensors = find_cache_tensors(analysis, options, bits, windows)
    recurrences = find_recurrent_tensors(analysis, options)
    states = [one.past for one in tensors if one.state_rows is not None] + [one.past for one in recurrences]
    if states and past_length == "per-sequence":
        raise UnsupportedError(
            "the padding of shorter sequences would enter a state, which no later call overwrites",
            code=Code.MIXES_TOKENS, at=states[0], expected="attention only", hint="use past-length=input",
        )  # fmt: skip
    return CachePlan(
        cache_mode=options.cache, past_length=past_length, past=past, present=present, total=total,
        token_rows=find_token_rows(analysis.inputs), tensors=tensors, recurrences=recurrences,
        limit=proof.max_length if past is CAPACITY else proof.limit, max_length=proof.max_length,
    )  # fmt: skip


def _check_options(options: CacheOptions, analysis: Analysis, proof: Proof) -> PastLength:
    """Return the source of the past length after checking all options."""
    allowed = _PAST_LENGTHS[options.cache]
    past_length = options.past_length or allowed[0]
    if past_length not in allowed:
        raise UsageError(f"cache {options.cache}: expected past-length {' or '.join(allowed)}, found {past_length}")
    capacity, longest = options.max_length, proof.max_length
    if capacity is not None and options.cache != "static":
        raise UsageError(f"cache {options.cache}: expected no max-length, found {capacity}; use fix-shapes for that")
    at = analysis.inputs[0].value.name
    if capacity is not None and longest is not None and capacity > longest:
        raise UnsupportedError(
            "the capacity of the cache exceeds the maximum length of the model", code=Code.LENGTH_LIMIT, at=at,
            expected=f"max-length of at most {longest}", found=str(capacity),
        )  # fmt: skip
    if capacity is not None and isinstance(analysis.length, int) and capacity < analysis.length:
        raise UnsupportedError(
            "the capacity of the cache is less than the fixed length of the export", code=Code.FIXED_LENGTH, at=at,
            expected=f"max-length {analysis.length}", found=str(capacity),
        )  # fmt: skip
    for layout in (options.key_layout, options.value_layout):
        if sorted(layout) != sorted(DEFAULT_LAYOUT):
            expected = ", ".join(DEFAULT_LAYOUT)
            raise UsageError(f"expected a layout of {expected} in any order, found {', '.join(layout)}")
    return past_length


def _rows(options: CacheOptions, past_length: PastLength, length: Dimension) -> tuple[Dimension, Dimension, Dimension]:
    """Return the rows of a cache input, of a cache output, and of the keys that attention reads."""
    if options.cache == "dynamic":
        return PAST, TOTAL, TOTAL
    if options.cache == "static":
        capacity = options.max_length or (length if isinstance(length, int) else MAX)
        return capacity, capacity, TOTAL if past_length == "mask" else capacity
    if past_length == "shape":
        return PAST, NEW, TOTAL
    if isinstance(length, int):
        raise UnsupportedError(
            "unfilled rows come before the tokens, and an export of fixed length has no context for them",
            code=Code.FIXED_LENGTH, expected="an export of dynamic length", found=f"{length} tokens",
            hint="use past-length=shape or cache=static",
        )  # fmt: skip
    return CAPACITY, NEW, dim.add(CAPACITY, NEW)


def find_sources(
    plan: CachePlan, analysis: Analysis, editor: Editor, pasts: Mapping[CacheTensor, ir.Value]
) -> dict[sympy.Symbol, LengthSource]:
    """Return the source of each length at run time, and add the separate input if the plan has one."""
    dimensions = {}
    for given in sorted(analysis.inputs, key=lambda given: not given.is_token):
        length = NEW if given.is_token else 0  # no source of a length
        dimensions[given.value] = [
            length if axis in given.lengths else size for axis, size in enumerate(given.dimensions)
        ]
    sources = sources_of(dimensions)
    growing = next((tensor for tensor in plan.tensors if tensor.kept is None), None)
    if growing is None and any(set(given.lengths.values()) == {Length.TOTAL} for given in analysis.inputs):
        sources[PAST] = _past_length_of_mask(analysis, editor, sources[NEW]), None
    elif growing is not None and isinstance(plan.past, sympy.Symbol):
        sources[plan.past] = pasts[growing], growing.axis
    if plan.past_length == "input":
        sources[PAST] = add_past_length(editor, 1), None
    elif plan.past_length == "positions":
        positions = _single(find_positions(analysis.inputs), "an input of positions").value
        sources[PAST] = first_position(editor, positions, name="positions.flat"), None
    elif plan.past_length == "mask":
        sources[PAST] = _past_length_of_mask(analysis, editor, sources[NEW]), None
    return sources


def first_position(editor: Editor, positions: ir.Value, name: str) -> ir.Value:
    """Return the position of the first new token of the first sequence: the past length without left padding."""
    dtype = positions.dtype
    flat = editor.node("Reshape", [positions, editor.constant([-1])], name=name, dtype=dtype)
    return editor.node("Gather", [flat, editor.constant([0])], name="position.first", dtype=dtype, shape=[1])


def add_past_length(editor: Editor, count: Dimension) -> ir.Value:
    """Add a separate input, int64 [count]: no model can take it for a mask or positions."""
    editor.take_name(PAST_LENGTH)
    value = ir.Value(name=PAST_LENGTH, type=ir.TensorType(INT64), shape=ir.Shape(dim_names([count])))
    editor.graph.inputs.append(value)
    return value


def _past_length_of_mask(analysis: Analysis, editor: Editor, new: LengthSource) -> ir.Value:
    """Return the length of the mask, which covers past and new tokens, minus the new tokens."""
    masks = [given for given in analysis.inputs if set(given.lengths.values()) == {Length.TOTAL}]
    mask = _single(masks, "an attention mask of past and new tokens")
    sizes = []
    for value, axis in ((mask.value, next(iter(mask.lengths))), new):
        shape = editor.node("Shape", [value], name=f"{value.name}_shape", dtype=INT64)
        index = editor.constant([axis])
        sizes.append(editor.node("Gather", [shape, index], name="length", dtype=INT64, shape=[1]))
    return editor.node("Sub", sizes, name="past_length", dtype=INT64, shape=[1])


def _single(found: Sequence[InputRole], expected: str) -> InputRole:
    if len(found) != 1:
        names = ", ".join(given.value.name or "" for given in found) or "none"
        raise UnsupportedError(
            "no input gives the number of past tokens", code=Code.INPUT_ROLE, expected=expected, found=names,
            hint=f"export the model with {expected}, or use past-length=input",
        )  # fmt: skip
    return found[0]
