"""How an operand of a product is read from what is remembered: moved, repeated and scaled, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from kvsurgeon.analysis.cache_points import CachePoint
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension

Labels = tuple[str, ...]
Before = Mapping[ir.Node, tuple[ir.Value | None, ...]]  # each node's inputs before surgery

BATCH, TOKENS, FEATURES, HEADS, REPEATS = "batch", "tokens", "features", "heads", "repeats"


@dataclass(frozen=True, kw_only=True)
class LayoutTrace:
    """A tensor as a view of what is remembered.

    Attributes:
        axes: What each axis holds, from the outermost in: labels such as "batch", "heads.0", "tokens" or "repeats.0".
            An axis of size 1 holds nothing.
        sizes: The size of each label, at the one length of the export.
        scales: What it was multiplied with or divided by since: operators and single numbers.
        steps: The operators between, from what is remembered to the tensor.
    """

    axes: tuple[Labels, ...]
    sizes: Mapping[str, Dimension]
    scales: tuple[tuple[str, ir.Value], ...] = ()
    steps: tuple[ir.Node, ...] = field(default=(), repr=False)

    @property
    def repeats(self) -> int:
        """How often each head is there."""
        whole = dim.product(size for label, size in self.sizes.items() if label.startswith(REPEATS))
        assert isinstance(whole, int)
        return whole

    def stacks_heads(self, last: Sequence[Labels]) -> bool:
        """Whether it is [batch, heads, repeats, *last], whichever of the first three share an axis.

        Heads that the tensor holds on several axes must be in the order in which they are remembered; repeats are alike
        in any order.
        """
        places = [_place(label) for axis in self.axes[:-2] for label in axis]
        return list(self.axes[-2:]) == list(last) and places == sorted(places)


def _place(label: str) -> tuple[int, int]:
    """Where a label belongs in [batch, heads, repeats]."""
    kind, _, place = label.partition(".")
    return [BATCH, HEADS, REPEATS].index(kind), int(place) if kind == HEADS else 0


def read(flow: TokenFlow, before: Before, operand: ir.Value, memory: CachePoint) -> LayoutTrace | None:
    """Return how `operand` is read from what `memory` remembers; None where more is done on the way."""
    path = _path(flow, before, operand, memory.value)
    shape = flow.shapes[memory.value].shape
    if path is None or shape is None:
        return None
    labels = _labels(memory)
    sizes = {label: flow.length if size is None else size for label, size in zip(labels, memory.parts, strict=True)}
    axes = _regrouped(labels, sizes, shape)
    reading = None if axes is None else LayoutTrace(axes=axes, sizes=sizes)
    for node in path:
        if reading is None:
            return None
        reading = _MOVES[node.op_type](flow, before, node, replace(reading, steps=(*reading.steps, node)))
    return reading


def _path(flow: TokenFlow, before: Before, operand: ir.Value, start: ir.Value) -> list[ir.Node] | None:
    path: list[ir.Node] = []
    value: ir.Value | None = operand
    while value is not start:
        node = None if value is None else value.producer()
        if node is None or node.op_type not in _MOVES or node not in before or len(node.outputs) != 1:
            return None
        path.append(node)
        value = before[node][_operand(flow, before[node])]
    return path[::-1]


def _operand(flow: TokenFlow, inputs: Sequence[ir.Value | None]) -> int:
    """The index of the first input that holds tokens."""
    return next((index for index, value in enumerate(inputs) if value is not None and flow.axes.get(value)), 0)


def _labels(memory: CachePoint) -> list[str]:
    """A label for each part of the remembered tensor, in its own order."""
    named = {place: f"{HEADS}.{place}" for place in range(len(memory.parts))}
    *leading, tokens, features = memory.order
    named |= {place: BATCH for place in leading if not isinstance(memory.parts[place], int)}
    if isinstance(memory.batch, int) and memory.batch > 1 and memory.parts[leading[0]] == memory.batch:
        named[leading[0]] = BATCH
    named |= {tokens: TOKENS, features: FEATURES}
    return [named[place] for place in range(len(memory.parts))]


def _regrouped(
    labels: Sequence[str], sizes: Mapping[str, Dimension], shape: Sequence[Dimension]
) -> tuple[Labels, ...] | None:
    """Distribute labels over the axes of a row-major tensor of this shape; None where one would be cut in two."""
    left = [label for label in labels if sizes[label] != 1]
    axes: list[Labels] = []
    for size in shape:
        held: list[str] = []
        while not dim.is_equal(dim.product(sizes[label] for label in held), size):
            if not left:
                return None
            held.append(left.pop(0))
        axes.append(tuple(held))
    return None if left else tuple(axes)


def _reshape(flow: TokenFlow, before: Before, node: ir.Node, reading: LayoutTrace) -> LayoutTrace | None:
    shape = flow.shapes[node.outputs[0]].shape
    labels = [label for axis in reading.axes for label in axis]
    axes = None if shape is None else _regrouped(labels, reading.sizes, shape)
    return None if axes is None else replace(reading, axes=axes)


def _transpose(flow: TokenFlow, before: Before, node: ir.Node, reading: LayoutTrace) -> LayoutTrace | None:
    order = node.attributes.get_ints("perm") or tuple(reversed(range(len(reading.axes))))
    return replace(reading, axes=tuple(reading.axes[place] for place in order))


def _expand(flow: TokenFlow, before: Before, node: ir.Node, reading: LayoutTrace) -> LayoutTrace | None:
    """An axis of size 1 that grows holds repeats from here on."""
    source, shape = flow.shapes[before[node][0]].shape, flow.shapes[node.outputs[0]].shape  # type: ignore[index]
    if source is None or shape is None or len(source) != len(shape):
        return None
    axes, sizes = list(reading.axes), dict(reading.sizes)
    for place, (old, new) in enumerate(zip(source, shape, strict=True)):
        if dim.is_equal(old, new):
            continue
        if old != 1 or not isinstance(new, int):
            return None
        label = f"{REPEATS}.{len(sizes)}"
        axes[place], sizes[label] = (label,), new
    return replace(reading, axes=tuple(axes), sizes=sizes)


def _scale(flow: TokenFlow, before: Before, node: ir.Node, reading: LayoutTrace) -> LayoutTrace | None:
    mine = _operand(flow, before[node])
    other = before[node][1 - mine]
    shape = None if other is None else flow.shapes[other].shape
    is_single = shape is not None and dim.product(shape) == 1 and len(shape) <= len(reading.axes)
    if other is None or not is_single or flow.axes.get(other) or (node.op_type == "Div" and mine == 1):
        return None
    return replace(reading, scales=(*reading.scales, (node.op_type, other)))


def _cast(flow: TokenFlow, before: Before, node: ir.Node, reading: LayoutTrace) -> LayoutTrace | None:
    old, new = flow.shapes[before[node][0]].dtype, flow.shapes[node.outputs[0]].dtype  # type: ignore[index]
    return reading if old is not None and old is new else None


_MOVES: dict[str, Callable[[TokenFlow, Before, ir.Node, LayoutTrace], LayoutTrace | None]] = {
    "Reshape": _reshape, "Unsqueeze": _reshape, "Squeeze": _reshape, "Flatten": _reshape, "Identity": _reshape,
    "Transpose": _transpose, "Expand": _expand, "Tile": _expand, "Mul": _scale, "Div": _scale, "Cast": _cast,
}  # fmt: skip
