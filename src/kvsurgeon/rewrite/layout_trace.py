"""Layout trace: which moves, repeats and scales lead from a cached tensor to an operand of a product, if only those."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.cache_points import CachePoint
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.resizing.token_data import InputsBefore
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension

Labels = tuple[str, ...]

BATCH, SEQUENCE, HEAD_DIM, HEADS, REPEATS = "batch", "sequence", "head_dim", "heads", "repeats"


@dataclass(frozen=True, kw_only=True)
class LayoutTrace:
    """A tensor as a view of a cached tensor.

    Attributes:
        axes: Labels of each axis, outermost first, such as "batch", "heads.0", "sequence" or "repeats.0"; an axis of
            size 1 has none.
        sizes: Size of each label, at the length of the export.
        scales: Operators and scalars that the tensor was multiplied with or divided by.
        steps: Operators from the cached tensor to the tensor.
    """

    axes: tuple[Labels, ...]
    sizes: Mapping[str, Dimension]
    scales: tuple[tuple[str, ir.Value], ...] = ()
    steps: tuple[ir.Node, ...] = field(default=(), repr=False)

    @property
    def repeats(self) -> int:
        """Number of repetitions of each head."""
        repeats = dim.product(size for label, size in self.sizes.items() if label.startswith(REPEATS))
        assert isinstance(repeats, int)
        return repeats

    def is_grouped(self, last: Sequence[Labels]) -> bool:
        """Return whether the tensor is [batch, heads, repeats, *last], whichever of the first three share an axis.

        Heads on several axes must be in the order in which they are cached; repeats are equal in any order.
        """
        places = [rank_of(label) for axis in self.axes[:-2] for label in axis]
        return list(self.axes[-2:]) == list(last) and places == sorted(places)


def rank_of(label: str) -> tuple[int, int]:
    """Return the rank of a label in [batch, heads, repeats]."""
    kind, _, index = label.partition(".")
    return [BATCH, HEADS, REPEATS].index(kind), int(index) if kind == HEADS else 0


def trace_layout(flow: TokenFlow, before: InputsBefore, operand: ir.Value, point: CachePoint) -> LayoutTrace | None:
    """Return the trace from a cached tensor to an operand; None if other operators lie between."""
    path = _path(flow, before, operand, point.value)
    shape = flow.shapes[point.value].shape
    if path is None or shape is None:
        return None
    labels = _labels(point)
    sizes = {label: flow.length if size is None else size for label, size in zip(labels, point.parts, strict=True)}
    axes = dim.distribute(((label, sizes[label]) for label in labels), shape)
    trace = None if axes is None else LayoutTrace(axes=tuple(map(tuple, axes)), sizes=sizes)
    for node in path:
        rule = _rule(node)
        if trace is None or rule is None:
            return None
        trace = rule(flow, before, node, replace(trace, steps=(*trace.steps, node)))
    return trace


def _path(flow: TokenFlow, before: InputsBefore, operand: ir.Value, start: ir.Value) -> list[ir.Node] | None:
    """Return the operators from a value to an operand; None if one has no rule."""
    path: list[ir.Node] = []
    value: ir.Value | None = operand
    while value is not start:
        node = None if value is None else value.producer()
        if node is None or _rule(node) is None or node not in before or len(node.outputs) != 1:
            return None
        path.append(node)
        value = before[node][_token_input(flow, before[node])]
    return path[::-1]


def _token_input(flow: TokenFlow, inputs: Sequence[ir.Value | None]) -> int:
    """Return the index of the first input with a sequence axis."""
    return next((index for index, value in enumerate(inputs) if value is not None and flow.axes.get(value)), 0)


def _labels(point: CachePoint) -> list[str]:
    """Return a label for each part of a cached tensor."""
    labels = {place: f"{HEADS}.{place}" for place in range(len(point.parts))}
    *leading, sequence, head_dim = point.order
    labels |= {place: BATCH for place in leading if not isinstance(point.parts[place], int)}
    if isinstance(point.batch, int) and point.batch > 1 and point.parts[leading[0]] == point.batch:
        labels[leading[0]] = BATCH
    labels |= {sequence: SEQUENCE, head_dim: HEAD_DIM}
    return [labels[place] for place in range(len(point.parts))]


def _reshape(flow: TokenFlow, before: InputsBefore, node: ir.Node, trace: LayoutTrace) -> LayoutTrace | None:
    shape = flow.shapes[node.outputs[0]].shape
    labels = [label for axis in trace.axes for label in axis]
    axes = None if shape is None else dim.distribute(((label, trace.sizes[label]) for label in labels), shape)
    return None if axes is None else replace(trace, axes=tuple(map(tuple, axes)))


def _transpose(flow: TokenFlow, before: InputsBefore, node: ir.Node, trace: LayoutTrace) -> LayoutTrace | None:
    order = node.attributes.get_ints("perm") or tuple(reversed(range(len(trace.axes))))
    return replace(trace, axes=tuple(trace.axes[place] for place in order))


def _repeat(flow: TokenFlow, before: InputsBefore, node: ir.Node, trace: LayoutTrace) -> LayoutTrace | None:
    """Label copies of an axis, one after the other, as repeats."""
    source, shape = flow.shapes[before[node][0]].shape, flow.shapes[node.outputs[0]].shape  # type: ignore[index]
    if source is None or shape is None or len(source) != len(shape):
        return None
    axes, sizes = list(trace.axes), dict(trace.sizes)
    for place, (old, new) in enumerate(zip(source, shape, strict=True)):
        if dim.is_equal(old, new):
            continue
        times = dim.exact_quotient(new, old)
        if not isinstance(times, int):
            return None
        label = f"{REPEATS}.{len(sizes)}"
        axes[place], sizes[label] = (label, *axes[place]), times
    return replace(trace, axes=tuple(axes), sizes=sizes)


def _lookup(flow: TokenFlow, before: InputsBefore, node: ir.Node, trace: LayoutTrace) -> LayoutTrace | None:
    """Label elements of an axis that indices repeat as repeats."""
    place, tensor = node.attributes.get_int("axis", 0) % len(trace.axes), constant_tensor(before[node][1])
    labels = trace.axes[place]
    counts = [size for label in labels if isinstance(size := trace.sizes[label], int)]
    if tensor is None or len(tensor.shape) != 1 or len(counts) < len(labels):
        return None
    indices, elements = tensor.numpy(), np.arange(math.prod(counts)).reshape(counts)
    times, rest = divmod(indices.size, elements.size)
    for split in range(len(labels) + 1):
        copies = np.repeat(np.expand_dims(elements, split), times, axis=split)
        if not rest and np.array_equal(copies.reshape(-1), indices):
            label = f"{REPEATS}.{len(trace.sizes)}"
            axis = (*labels[:split], label, *labels[split:])
            axes = (*trace.axes[:place], axis, *trace.axes[place + 1 :])
            return replace(trace, axes=axes, sizes={**trace.sizes, label: times})
    return None


def _scale(flow: TokenFlow, before: InputsBefore, node: ir.Node, trace: LayoutTrace) -> LayoutTrace | None:
    index = _token_input(flow, before[node])
    scale = before[node][1 - index]
    shape = None if scale is None else flow.shapes[scale].shape
    is_scalar = shape is not None and dim.product(shape) == 1 and len(shape) <= len(trace.axes)
    if scale is None or not is_scalar or flow.axes.get(scale) or (node.op_type == "Div" and index == 1):
        return None
    return replace(trace, scales=(*trace.scales, (node.op_type, scale)))


def _cast(flow: TokenFlow, before: InputsBefore, node: ir.Node, trace: LayoutTrace) -> LayoutTrace | None:
    old, new = flow.shapes[before[node][0]].dtype, flow.shapes[node.outputs[0]].dtype  # type: ignore[index]
    return trace if old is not None and old is new else None


_Rule = Callable[[TokenFlow, InputsBefore, ir.Node, LayoutTrace], "LayoutTrace | None"]

_RULES: dict[Trait, _Rule] = {
    Trait.RESHAPE: _reshape, Trait.TRANSPOSE: _transpose, Trait.REPEAT: _repeat, Trait.SCALE: _scale,
    Trait.IDENTITY: _cast, Trait.LOOKUP: _lookup,
}  # fmt: skip


def _rule(node: ir.Node) -> _Rule | None:
    return next((rule for trait, rule in _RULES.items() if has_trait(node, trait)), None)
