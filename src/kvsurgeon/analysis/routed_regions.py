"""Islands: nodes that pick tokens by what is in them, work on those, and put the results back where they were taken.

A mixture of experts that is exported as a loop over its experts does this, or one that sorts its tokens. Inside, no
axis holds the tokens in order, so they cannot be followed. But the whole, from tensors with all tokens to a tensor with
all tokens, can be run: if what comes out for a token depends on nothing but what goes in for it, the island is
position-wise. That is seen, not proved.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.call_indices import is_of_new_tokens
from kvsurgeon.analysis.mask_patterns import all_seen, close, unfolded
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import constant_tensor, small_constant
from kvsurgeon.ops.gather import slice_bounds
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.sequence_axes import Axes, Length, SequenceAxis

SEEN = "routing that depends on the tokens: that it keeps them apart was seen by running it"
_INSIDE = (
    Trait.ROUTING, Trait.BROADCAST, Trait.ELEMENTWISE, Trait.ARITHMETIC, Trait.LOOKUP, Trait.PRODUCT, Trait.RESHAPE,
    Trait.REPEAT, Trait.SELECT, Trait.MOVE, Trait.SHAPE_ONLY,
)  # fmt: skip
_LIMITS = (Trait.ORDER, Trait.BOUND, Trait.ROUTING)
_PLACES = 33  # tokens of the longest text that is run; shorter and longer ones are made of the same
_TEXTS = (range(_PLACES)[::-1], (5, 3, 3, 20, 31, 0, 8), (4,), (9, 30), [place * 7 % _PLACES for place in range(300)])


@dataclass(frozen=True, kw_only=True)
class RoutedRegion:
    """Nodes in order, of which the last puts tokens back."""

    nodes: tuple[ir.Node, ...]
    axes: Axes  # of its result

    @property
    def result(self) -> ir.Value:
        """The tensor with all tokens."""
        return self.nodes[-1].outputs[0]


def find_routed_region(flow: TokenFlow, start: ir.Node) -> RoutedRegion | None:
    """The smallest island that begins at a node which picks or sorts tokens; None where they are not put back."""
    region, made = [start], set(start.outputs)
    may_stand_inside = _picked if has_trait(start, Trait.ROUTING) else _sorted
    for node in list(flow.order)[flow.order[start] + 1 :]:
        if not any(value in made for value in node.inputs):
            continue
        region.append(node)
        made.update(node.outputs)
        if not may_stand_inside(flow, node) or any(value.is_graph_output() for value in region[-2].outputs):
            return None
        axes = _tokens_in(flow, node.outputs[0])
        inside = set(region)
        if axes and all(user in inside for value in made - set(node.outputs) for user, _ in value.uses()):
            return RoutedRegion(nodes=tuple(region), axes=axes)
    return None


def begins_sorted(flow: TokenFlow, node: ir.Node) -> bool:
    """Whether a node brings all tokens into another order, or counts them, as where each expert takes its own."""
    dtype = flow.shapes[node.outputs[0]].dtype
    return _sorts_all(flow, node) or (node.op_type == "ReduceSum" and dtype is not None and dtype.is_integer())


def joined(routed_regions: Collection[RoutedRegion], order: Mapping[ir.Node, int]) -> RoutedRegion | None:
    """Islands that overlap are one; None where they do not end together."""
    first, *others = routed_regions
    if any(other.nodes[-1] is not first.nodes[-1] for other in others):
        return None
    nodes = {node for island in routed_regions for node in island.nodes}
    return RoutedRegion(nodes=tuple(sorted(nodes, key=lambda node: order[node])), axes=first.axes)


def _picked(flow: TokenFlow, node: ir.Node) -> bool:
    return has_trait(node, *_INSIDE)


def _sorted(flow: TokenFlow, node: ir.Node) -> bool:
    """Whether a node may stand where tokens are sorted: none that tells the first so many from the others."""
    if node.op_type == "Slice":
        bounds, shape = slice_bounds(flow.shapes.call(node)), flow.shapes.call(node).fact(0).shape
        return bounds is not None and shape is not None and all(isinstance(shape[axis], int) for axis in bounds[0])
    if has_trait(node, *_LIMITS):
        constants = [small_constant(value) for value in node.inputs]
        return any(constant is not None and not constant.any() for constant in constants)  # a sign, or whether any
    return begins_sorted(flow, node) or has_trait(node, *_INSIDE)


def _sorts_all(flow: TokenFlow, node: ir.Node) -> bool:
    if node.op_type != "TopK":
        return False
    call = flow.shapes.call(node)
    before, after = call.fact(0).shape, flow.shapes[node.outputs[0]].shape
    axis = call.integer("axis", -1)
    return bool(before and after) and dim.is_equal(before[axis], after[axis]) is True  # type: ignore[index]


def _tokens_in(flow: TokenFlow, value: ir.Value) -> Axes:
    """Where tokens lie in a tensor of that shape: alone on an axis, or behind their batch."""
    for place, size in enumerate(flow.shapes[value].shape or ()):
        for outer in (1, flow.batch):
            if not isinstance(size, int) and dim.is_equal(size, dim.multiply(outer, flow.length)):
                return (SequenceAxis(place, flow.stream, outer),)
    return ()


def record_routed_region(flow: TokenFlow, island: RoutedRegion) -> None:
    """Note where the tokens are in an island's result.

    Raises:
        UnsupportedError: It was not seen to keep them apart.
    """
    read = {value for node in island.nodes for value in node.inputs if value is not None}
    outside = read - {value for node in island.nodes for value in node.outputs}
    context = [value for value in outside if flow.kinds.get(value) is ValueKind.CONTEXT]
    tokens = [value for value in outside if flow.kinds.get(value) is ValueKind.TOKEN]
    how = _signature(flow, island)
    if how not in flow.routed_regions.values() and not (
        all(is_of_new_tokens(flow, value) for value in context) and _keeps_apart(flow, island, tokens)
    ):
        raise UnsupportedError(
            f"{island.nodes[0].op_type}: it picks tokens by what is in them, and was not seen to keep them apart",
            at=island.nodes[0].outputs[0].name,
        )
    flow.routed_regions.update(dict.fromkeys(island.nodes, how))
    flow.assumed.setdefault(SEEN, island.nodes[0].outputs[0].name or "")
    flow.axes[island.result] = island.axes


def _keeps_apart(flow: TokenFlow, island: RoutedRegion, tokens: Sequence[ir.Value]) -> bool:
    """Whether rows of the result depend on nothing but the rows of the same tokens, in whatever text they stand."""
    sources = _sources(flow, tokens)
    if sources is None:
        return False
    try:
        experiment = SubgraphRunner(
            flow=flow, inputs=flow.inputs, opsets=flow.opsets, outputs=[island.result], stand_ins=frozenset(sources)
        )
        whole = _rows(experiment, island, range(_PLACES))
        texts = [(text, _rows(experiment, island, text)) for text in _TEXTS]
    except Exception:  # whatever onnxruntime says: it was not seen
        return False
    return bool(np.ptp(whole) > 0) and all(close(whole[..., list(text)], rows) for text, rows in texts)


def _rows(experiment: SubgraphRunner, island: RoutedRegion, places: Sequence[int]) -> np.ndarray:
    array = experiment.run(len(places), all_seen, places=np.array(places))[0]
    return unfolded(array, island.axes, len(places))


def _sources(flow: TokenFlow, tokens: Sequence[ir.Value]) -> list[ir.Value] | None:
    """Tensors of floats from which what an island reads is made; None where there are none, or they are no stream's."""
    found: list[ir.Value] = []
    pending = list(tokens)
    while pending:
        value = pending.pop()
        if value in found or flow.kinds.get(value) is not ValueKind.TOKEN:
            continue
        node = value.producer()
        if not _is_float(flow, value) or _counts(flow, node):
            if node is None or node in flow.routed_regions:
                return None
            pending += [source for source in node.inputs if source is not None]
            continue
        axes = flow.axes.get(value, ())
        if len(axes) != 1 or axes[0].role.resolved() is not Length.NEW:
            return None
        found.append(value)
    return found


def _is_float(flow: TokenFlow, value: ir.Value) -> bool:
    dtype = flow.shapes[value].dtype
    return dtype is not None and dtype.is_floating_point()


def _counts(flow: TokenFlow, node: ir.Node | None) -> bool:
    """Whether what a node makes is floats in name only: made of whole numbers, such as which expert takes a token."""
    tokens = [
        value
        for value in (node.inputs if node else ())
        if value is not None and flow.kinds.get(value) is ValueKind.TOKEN
    ]
    return bool(tokens) and not any(_is_float(flow, value) for value in tokens)


def _signature(flow: TokenFlow, island: RoutedRegion) -> Hashable:
    """The same for routed_regions that compute the same, of other weights."""
    numbers: dict[ir.Value, int] = {}
    steps: list[Hashable] = []

    def name(value: ir.Value | None) -> Hashable:
        if value is None or value in numbers:
            return numbers[value] if value is not None else None
        constant = small_constant(value)
        if constant is not None and constant.dtype.kind in "iub":
            return constant.shape, constant.tobytes()
        shape = flow.shapes[value].shape if flow.kinds.get(value) or constant_tensor(value) is not None else None
        return flow.kinds.get(value), str(shape)

    for node in island.nodes:
        attributes = tuple(sorted((key, repr(attribute.value)) for key, attribute in node.attributes.items()))
        steps.append((node.op_type, attributes, tuple(name(value) for value in node.inputs)))
        for value in node.outputs:
            numbers[value] = len(numbers)
    return tuple(steps)
