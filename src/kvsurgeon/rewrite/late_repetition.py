"""Late repetition: heads are repeated after what is computed from each copy alike, as a rotation.

An export may repeat keys and values first. The smallest tensor to cache is then the one before, and everything after is
computed again at each step, for all past tokens. Instead, one of the copies is taken behind it, cached and repeated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis, analyze
from kvsurgeon.analysis.attention_sites import CachedOperand
from kvsurgeon.analysis.cache_points import bottlenecks, cache_point_of
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.resizing.token_data import InputsBefore
from kvsurgeon.rewrite.layout_trace import trace_layout
from kvsurgeon.rewrite.repeated_elements import RepeatedElements

_MOVES = (Trait.RESHAPE, Trait.TRANSPOSE, Trait.REPEAT, Trait.IDENTITY)


@dataclass(frozen=True, kw_only=True)
class _Copies:
    """An axis that holds copies.

    Attributes:
        axis: Its index.
        first: Index of one copy of each element.
        all: For each element of the axis, which of these it equals.
    """

    axis: int
    first: np.ndarray
    all: np.ndarray


def with_late_repetition(analysis: Analysis) -> Analysis:
    """Return the analysis of a copy of the model in which repetition comes last; the analysis itself without need."""
    repeated, before = RepeatedElements(analysis.flow), {node: tuple(node.inputs) for node in analysis.flow.order}
    operands = [operand for site in analysis.sites for operand in (*site.keys, *site.values)]
    found = {
        value: copies for operand in operands for value, copies in _later(analysis.flow, before, repeated, operand)
    }
    if not found:
        return analysis
    model = copy_model(analysis.model)
    editor = Editor(model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    distinct = {_take_one(editor, values[value.name], copies).name for value, copies in found.items()}
    editor.finish()
    try:
        late = analyze(model)
    except UnsupportedError:
        return analysis
    cached = {operand.cache_point.value.name for site in late.sites for operand in (*site.keys, *site.values)}
    return late if distinct <= cached else analysis


def _later(
    flow: TokenFlow, before: InputsBefore, repeated: RepeatedElements, operand: CachedOperand
) -> list[tuple[ir.Value, list[_Copies]]]:
    """Return the last tensor that is computed before a product, if it holds copies and is no larger without them."""
    point, (node, index) = operand.cache_point, flow.origin(operand.place)
    value = node.inputs[index]
    is_traced = value is not None and trace_layout(flow, before, value, point) is not None
    if value is None or (is_traced and not _copies(repeated, point.value)):
        return []
    for candidate in bottlenecks(flow, [value]):
        copies = _copies(repeated, candidate)
        found = cache_point_of(flow, candidate) if copies else None
        times = math.prod(len(one.all) // len(one.first) for one in copies)
        is_small = found is not None and found.bits_per_token <= point.bits_per_token * times
        if is_small and not has_trait(candidate.producer(), *_MOVES):
            return [(candidate, copies)]
        if candidate is point.value:
            break
    return []


def _copies(repeated: RepeatedElements, value: ir.Value) -> list[_Copies]:
    """Return the axes of features of a value that hold copies."""
    found: list[_Copies] = []
    for axis, parts in enumerate(repeated.of(value)):
        sizes = [size for size, _ in parts if isinstance(size, int) and size > 0]
        if len(sizes) < len(parts) or not any(is_repeated for _, is_repeated in parts):
            continue
        kept = [1 if is_repeated else size for size, (_, is_repeated) in zip(sizes, parts, strict=True)]
        places = np.arange(math.prod(sizes)).reshape(sizes)[tuple(slice(size) for size in kept)]
        numbers = np.broadcast_to(np.arange(math.prod(kept)).reshape(kept), sizes)
        found.append(_Copies(axis=axis, first=places.reshape(-1), all=numbers.reshape(-1)))
    return found


def _take_one(editor: Editor, value: ir.Value, copies: list[_Copies]) -> ir.Value:
    """Take one copy of each element of a value, and repeat it for all that read the value; return it."""
    users, name = list(value.uses()), value.name
    distinct = value
    for one in copies:
        inputs = [distinct, editor.constant(one.first, name="distinct")]
        distinct = editor.node("Gather", inputs, {"axis": one.axis}, name=f"{name}.distinct", dtype=value.dtype)
    again = distinct
    for one in copies:
        inputs = [again, editor.constant(one.all, name="repeated")]
        again = editor.node("Gather", inputs, {"axis": one.axis}, name=f"{name}.repeated", dtype=value.dtype)
    for user, index in users:
        editor.replace_input(user, index, again)
    return distinct
