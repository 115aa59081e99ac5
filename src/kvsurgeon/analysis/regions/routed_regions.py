"""Routed regions: nodes that select tokens by content, process them, and put the results back at their positions.

A mixture of experts is exported like this, as a loop over experts or as a sort of the tokens by expert. Inside, no axis
holds the tokens in order, so the sequence axis cannot be traced. The whole region, from tensors with all tokens to a
tensor with all tokens, can be run: if the result of a token depends on the inputs of that token alone, the region is
position-wise. This is measured, not proved.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.call_indices import follows_query_length
from kvsurgeon.analysis.mask_patterns import is_close, sequence_last
from kvsurgeon.analysis.probe_inputs import AMPLIFIED, Rows, batch_axis, join_sequences
from kvsurgeon.analysis.regions.probe_lengths import lengths_beyond
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.token_data import growing_regions, is_closed, is_token, token_inputs, with_upstream
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor, small_constant
from kvsurgeon.graph.query import upstream
from kvsurgeon.graph.value_numbering import ValueNumbering
from kvsurgeon.ops.gather import FAR, slice_bounds
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import find_links, has_trait
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.sequence_axes import Axes, Length, SequenceAxis

RoutedRegion = tuple[ir.Node, ...]  # in graph order; the last node puts the tokens back at their positions

ROUTING_IS_POSITION_WISE = "routing processes each token independently (measured on probe inputs)"
_INSIDE = (
    Trait.ROUTING, Trait.BROADCAST, Trait.ELEMENTWISE, Trait.ARITHMETIC, Trait.LOOKUP, Trait.PRODUCT, Trait.RESHAPE,
    Trait.REPEAT, Trait.SELECT, Trait.MOVE, Trait.SHAPE_ONLY,
)  # fmt: skip
_ALONG_AXES = (Trait.REDUCTION, Trait.SOFTMAX, Trait.NORMALIZATION)
_LIMITS = (Trait.ORDER, Trait.BOUND, Trait.ROUTING)
# Of the first text; the other texts consist of these tokens.
_TOKENS = np.arange(33) + AMPLIFIED * (np.arange(33) >= 25)
_ALL, _REPEATED = np.arange(33), (0, 6, 30)  # indices of tokens
_TEXTS = [
    _ALL[::-1], *(np.array(text) for text in ((5, 3, 3, 20, 31, 0, 8), (4,), (9, 30))), np.arange(300) * 7 % 33,
    *(np.full(90, token) for token in _REPEATED),
]  # fmt: skip
_SECOND = (_ALL[::-1], np.full(33, 6), np.full(33, 30))  # other second sequences of a batch


def find_routed_region(flow: TokenFlow, start: ir.Node) -> RoutedRegion | None:
    """Return the smallest region from a node that selects or sorts tokens; None if they are not put back."""
    may_be_inside = _is_routing if has_trait(start, Trait.ROUTING) else _is_sorting
    for region in growing_regions(flow, start):
        node = region[-1]
        if node is start:
            continue
        if not may_be_inside(flow, node) or any(value.is_graph_output() for value in region[-2].outputs):
            return None
        if token_axes(flow, node.outputs[0]):
            whole = with_upstream(flow, region, partial(_is_of_selected, flow))
            if is_closed(whole, node.outputs) and all(may_be_inside(flow, one) for one in whole if one is not start):
                return tuple(whole)
    return None


def _is_of_selected(flow: TokenFlow, value: ir.Value | None) -> bool:
    """Return whether a value is computed from token data whose axes are not traced, or from its shape."""
    walked = upstream([value], stop=lambda one: one in flow.axes)
    return any(is_token(flow, one) and one not in flow.axes for one in walked)


def sorts_or_counts(flow: TokenFlow, node: ir.Node) -> bool:
    """Return whether a node sorts all tokens or counts them, as to group tokens by expert."""
    dtype = flow.shapes[node.outputs[0]].dtype
    return _sorts_all(flow, node) or (node.op_type == "ReduceSum" and dtype is not None and dtype.is_integer())


def join_regions(flow: TokenFlow, regions: Collection[RoutedRegion]) -> RoutedRegion | None:
    """Return overlapping regions as one; None if they do not end at the same node."""
    if len({region[-1] for region in regions}) > 1:
        return None
    return tuple(sorted({node for region in regions for node in region}, key=lambda node: flow.order[node]))


def _is_routing(flow: TokenFlow, node: ir.Node) -> bool:
    return (has_trait(node, *_INSIDE) and (node.op_type != "Slice" or _keeps_all(flow, node))) or (
        has_trait(node, *_ALONG_AXES) and _mixes_features(flow, node)
    )


def _mixes_features(flow: TokenFlow, node: ir.Node) -> bool:
    """Return whether a node mixes along axes of fixed size alone, such as the experts of a token."""
    call = flow.shapes.call(node)
    links = find_links(call)
    sizes = zip((links.inputs[0] or ()) if links is not None else (), call.fact(0).shape or (), strict=False)
    return links is not None and all(isinstance(size, int) for label, size in sizes if label in links.mixed)


def _keeps_all(flow: TokenFlow, node: ir.Node) -> bool:
    """Return whether a slice cuts off none of the tokens: it cuts axes of fixed size, keeps all, or gives a shape."""
    if node not in flow.read_for_content:
        return True
    call = flow.shapes.call(node)
    bounds, shape = slice_bounds(call), call.fact(0).shape
    return (
        bounds is not None
        and shape is not None
        and all(
            isinstance(shape[axis], int) or (start == 0 and step == 1 and _is_end(end))
            for axis, start, end, step in zip(*bounds, strict=True)
        )
    )


def _is_end(number: Dimension) -> bool:
    """Return whether a number is how many tokens were selected, or far more, and not a bound on them."""
    return number >= FAR if isinstance(number, int) else bool(number.is_Symbol)


def _is_sorting(flow: TokenFlow, node: ir.Node) -> bool:
    """Return whether a node may process sorted tokens: none that separates the first few from the others."""
    if node.op_type == "Slice":
        return _keeps_all(flow, node)
    if has_trait(node, *_LIMITS):
        constants = [small_constant(value) for value in node.inputs]
        return any(constant is not None and not constant.any() for constant in constants)  # compares with 0 only
    return sorts_or_counts(flow, node) or has_trait(node, *_INSIDE)


def _sorts_all(flow: TokenFlow, node: ir.Node) -> bool:
    if node.op_type != "TopK":
        return False
    call = flow.shapes.call(node)
    before, after = call.fact(0).shape, flow.shapes[node.outputs[0]].shape
    axis = call.integer("axis", -1)
    return bool(before and after) and dim.is_equal(before[axis], after[axis]) is True  # type: ignore[index]


def token_axes(flow: TokenFlow, value: ir.Value) -> Axes:
    """Return the sequence axis of a value by its sizes: the length alone, or batch * length."""
    for place, size in enumerate(flow.shapes[value].shape or ()):
        for outer in (1, flow.batch):
            if not isinstance(size, int) and dim.is_equal(size, dim.multiply(outer, flow.length)):
                return (SequenceAxis(place, flow.query_axis, outer),)
    return ()


def record_routed_region(flow: TokenFlow, region: RoutedRegion) -> None:
    """Record the sequence axis of a region's result after running the region.

    Raises:
        UnsupportedError: A token of the result depends on other tokens, or the region does not run.
    """
    read = {value for node in region for value in node.inputs if value is not None}
    outside = read - {value for node in region for value in node.outputs}
    context = [value for value in outside if flow.kinds.get(value) is ValueKind.CONTEXT]
    tokens = [value for value in outside if is_token(flow, value)]
    structure = _structure(flow, region)
    first = region[0].outputs[0].name or ""
    if structure not in flow.routed_regions.values() and not (
        all(follows_query_length(flow, value) for value in context) and _is_position_wise(flow, region, tokens)
    ):
        raise UnsupportedError(
            f"{region[0].op_type} selects tokens by content, and the result of a token may depend on other tokens",
            code=Code.MIXES_TOKENS, at=first, expected="a result of each token that depends on that token alone",
        )  # fmt: skip
    flow.routed_regions.update(dict.fromkeys(region, structure))
    flow.assumed.setdefault(ROUTING_IS_POSITION_WISE, first)
    flow.axes[region[-1].outputs[0]] = token_axes(flow, region[-1].outputs[0])


def _is_position_wise(flow: TokenFlow, region: RoutedRegion, tokens: Sequence[ir.Value]) -> bool:
    """Return whether the result of each token is the same in every text that contains the token."""
    sources = _float_sources(flow, tokens)
    if sources is None:
        return False
    result = region[-1].outputs[0]
    lengths = lengths_beyond(flow, result, sources)
    if lengths is None:
        return False

    def run(text: np.ndarray, second: np.ndarray | None = None) -> np.ndarray:
        return runner.run(len(text), tokens=_TOKENS[text], second_tokens=None if second is None else _TOKENS[second])[0]

    def by_token(array: np.ndarray, text: np.ndarray) -> np.ndarray:
        return sequence_last(array, token_axes(flow, region[-1].outputs[0]), Rows.of_text(len(text)))

    try:
        runner = SubgraphRunner(flow, [result], probed=sources, assumptions=flow.assumed)
        if runner.reads_numbers:
            return False
        alone, axis = run(_ALL), batch_axis(flow.shapes[result].shape)
        whole = by_token(alone, _ALL)
        texts = [*_TEXTS, *(np.full(length, token) for length in lengths for token in _REPEATED)]
        return (
            bool(np.ptp(whole) > 0)
            and all(is_close(whole[..., text], by_token(run(text), text)) for text in texts)
            and all(is_close(join_sequences(alone, run(text), axis), run(_ALL, text)) for text in _SECOND)
        )
    except Exception:  # whatever onnxruntime raises
        return False


def _float_sources(flow: TokenFlow, tokens: Sequence[ir.Value]) -> list[ir.Value] | None:
    """Return the float tensors that token data is computed from; None if one has no sequence axis of length S."""
    found: list[ir.Value] = []
    pending = list(tokens)
    while pending:
        value = pending.pop()
        if value in found or not is_token(flow, value):
            continue
        node = value.producer()
        if not _is_float(flow, value) or _is_made_of_integers(flow, node):
            if node is None or node in flow.routed_regions:
                return None
            pending += [source for source in node.inputs if source is not None]
            continue
        axes = flow.axes.get(value, ())
        if len(axes) != 1 or axes[0].variable.resolved() is not Length.NEW:
            return None
        found.append(value)
    return found


def _is_float(flow: TokenFlow, value: ir.Value) -> bool:
    dtype = flow.shapes[value].dtype
    return dtype is not None and dtype.is_floating_point()


def _is_made_of_integers(flow: TokenFlow, node: ir.Node | None) -> bool:
    """Return whether a node computes from integer token data alone, such as the expert of each token."""
    tokens = [] if node is None else token_inputs(flow, node)
    return bool(tokens) and not any(_is_float(flow, value) for value in tokens)


def _structure(flow: TokenFlow, region: RoutedRegion) -> Hashable:
    """Return a key that is equal for regions which compute the same from other weights."""
    inside = set(region)

    def leaf(value: ir.Value) -> Hashable | None:
        if value.producer() in inside:
            return None
        constant = small_constant(value)
        if constant is not None and constant.dtype.kind in "iub":
            return constant.shape, constant.tobytes()
        shape = flow.shapes[value].shape if flow.kinds.get(value) or constant_tensor(value) is not None else None
        return flow.kinds.get(value), str(shape)

    keys: dict[Hashable, int] = {}
    return ValueNumbering(leaf, keys=keys)[region[-1].outputs[0]], *keys
