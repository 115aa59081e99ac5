"""Follow the tokens through a graph: every operator on token data must keep them apart, except attention.

This is the proof that every other operator is position-wise: it is made of axes and shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from graphlib import TopologicalSorter
from heapq import heappop, heappush

import onnx_ir as ir

from kvsurgeon.analysis.axis_propagation import axes_after, check_batch
from kvsurgeon.analysis.learned_rows import with_learned_rows
from kvsurgeon.analysis.regions.recurrence import find_recurrence
from kvsurgeon.analysis.regions.routed_regions import (
    RoutedRegion,
    find_routed_region,
    join_regions,
    record_routed_region,
    sorts_or_counts,
    token_axes,
)
from kvsurgeon.analysis.regions.scans import find_scan
from kvsurgeon.analysis.regions.sequence_state import find_sequence_state, record_sequence_state
from kvsurgeon.analysis.regions.stateful_operators import find_stateful_operator
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.analysis.token_flow import NodeVisit, TokenFlow
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.dataflow.shape_inference import Shapes, raise_at
from kvsurgeon.dataflow.value_kinds import ValueKind, find_fixed_values
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.query import all_inputs, downstream
from kvsurgeon.ops.elementwise import draws_numbers
from kvsurgeon.ops.operator import AxisLinks, Trait, UntraceableAxesError
from kvsurgeon.ops.table import KNOWN_DOMAINS, axis_links, contraction_of, has_trait
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, Dimension
from kvsurgeon.symbolic.sequence_axes import Axes, Length, SequenceAxis

Rule = Callable[[NodeVisit, AxisLinks], list[Axes]]

_DECOMPOSE_HINT = "start from the graph before an optimizer fused this operator, or write it in standard operators"
_OPERATOR_HINT = "docs/writing-an-operator.md says how to add it"


def propagate_tokens(
    nodes: Sequence[ir.Node],
    inputs: list[InputRole],
    shapes: Shapes,
    kinds: dict[ir.Value, ValueKind],
    length: Dimension,
    opsets: Mapping[str, int],
) -> TokenFlow:
    """Return the sequence axes of all token data, and the context that meets it.

    Raises:
        UnsupportedError: An operator mixes tokens or is unknown, or a sequence axis cannot be traced.
    """
    order = {node: place for place, node in enumerate(nodes)}
    flow = TokenFlow(
        shapes=shapes, kinds=kinds, length=length, batch=_batch(inputs), order=order, inputs=inputs, opsets=opsets,
        fixed=find_fixed_values(nodes, inputs, shapes, kinds),
    )  # fmt: skip
    _check_random(flow)
    _check_encoder(flow)
    for given in inputs:
        if given.is_token:
            flow.axes[given.value] = tuple(SequenceAxis(axis, flow.query_axis) for axis in given.lengths)
    _trace(flow, nodes)
    _check_variables(flow)
    _check_outputs(flow)
    return flow


def _trace(flow: TokenFlow, nodes: Sequence[ir.Node]) -> None:
    """Trace all token data: nodes in graph order, but those that mix tokens after all that does not read their results.

    Of the nodes that wait, the one comes first whose region may end first. So the region around a node is the same in
    whatever order the graph lists its nodes.
    """
    sources = {node: _token_producers(flow, node) for node in nodes if any(is_token(flow, one) for one in node.outputs)}
    depths: dict[ir.Node, int] = {}
    for node, producers in sources.items():
        depths[node] = 1 + max((depths[producer] for producer in producers), default=0)
    order = TopologicalSorter(sources)
    order.prepare()
    routed_regions: dict[ir.Node, RoutedRegion] = {}
    ready: list[int] = []
    mixing: list[tuple[int, int, UnsupportedError]] = []
    while order.is_active():
        for node in order.get_ready():
            heappush(ready, flow.order[node])
        _, number, error = (0, heappop(ready), None) if ready else heappop(mixing)
        node = nodes[number]
        if node in routed_regions:
            if node is routed_regions[node][-1]:
                record_routed_region(flow, routed_regions[node])
        elif error is not None and node not in flow.state_nodes:
            _find_region(flow, node, routed_regions, error)
        elif node not in flow.state_nodes:
            try:
                _propagate(flow, node, axes_after)
            except UnsupportedError as found:
                heappush(mixing, (_first_end(flow, node, depths), number, found))
                continue
        order.done(node)


def _token_producers(flow: TokenFlow, node: ir.Node) -> list[ir.Node]:
    found = (value.producer() for value in all_inputs(node) if is_token(flow, value))
    return [node for node in found if node is not None]


def _first_end(flow: TokenFlow, node: ir.Node, depths: Mapping[ir.Node, int]) -> int:
    """Return the depth of the nearest node after another one whose result has an axis of all tokens."""
    ends = (value.producer() for value in downstream(node.outputs) if is_token(flow, value) and token_axes(flow, value))
    return next((depths[end] for end in ends if end is not None), 0)


def _check_random(flow: TokenFlow) -> None:
    """Check that no operator draws random numbers: no two calls agree, with a cache or without one.

    Raises:
        UnsupportedError: One does.
    """
    for node in flow.order:
        if draws_numbers(flow.shapes.call(node)):
            raise UnsupportedError(
                f"{node.op_type} draws random numbers, which differ in each call", code=Code.UNSUPPORTED,
                at=node.outputs[0].name, hint="export in evaluation mode, as after model.eval()",
            )  # fmt: skip


def _check_encoder(flow: TokenFlow) -> None:
    """Check that no attention is computed over an input without tokens, as an encoder inside the model does.

    Raises:
        UnsupportedError: One is.
    """
    for node in flow.order:
        if not has_trait(node, Trait.PRODUCT) or node.outputs[0] not in flow.fixed:
            continue
        call = flow.shapes.call(node)
        product = contraction_of(call)
        operands = () if product is None else (node.inputs[product.left], node.inputs[product.right])
        origins = [flow.fixed.get(value, frozenset()) for value in operands if value is not None]
        if product is not None and origins[0] & origins[1]:
            raise UnsupportedError(
                "the model contains an encoder, which each decode step would run again", code=Code.UNSUPPORTED,
                at=node.outputs[0].name, expected="a decoder that is given the encoder's output",
                found=f"attention over the input `{next(iter(origins[0] & origins[1])).name}`",
                hint="export encoder and decoder as two models",
            )  # fmt: skip


def _batch(inputs: list[InputRole]) -> Dimension:
    """Return the batch size of the token inputs: the axis before the sequence axis if no axis is the batch."""
    first = next(given for given in inputs if given.is_token)
    if BATCH in first.dimensions:
        return BATCH
    axis = next(iter(first.lengths))
    return first.dimensions[axis - 1] if axis else 1


def _find_region(
    flow: TokenFlow, node: ir.Node, routed_regions: dict[ir.Node, RoutedRegion], error: UnsupportedError
) -> None:
    """Find out what a node that mixes tokens belongs to: a routed region, a state, or learned rows in front of tokens.

    Raises:
        UnsupportedError: The error given, if it is none of them.
    """
    is_read = node in flow.read_for_content
    finders = (find_scan, find_stateful_operator, find_sequence_state, find_recurrence)
    if has_trait(node, Trait.ROUTING) and _starts_region(flow, node, routed_regions):
        return
    state = next(filter(None, (find(flow, node) for find in finders)), None) if is_read else None
    if state is not None:
        record_sequence_state(flow, state)
    elif (
        is_read
        and not _has_learned_rows(flow, node)
        and not (sorts_or_counts(flow, node) and _starts_region(flow, node, routed_regions))
    ):
        raise error


def _starts_region(flow: TokenFlow, node: ir.Node, routed_regions: dict[ir.Node, RoutedRegion]) -> bool:
    """Return whether a routed region starts at a node, and add it to the others, with which it may overlap."""
    found = find_routed_region(flow, node)
    if found is None:
        return False
    whole = join_regions(flow, {found, *(routed_regions[one] for one in found if one in routed_regions)})
    if whole is not None:
        routed_regions.update(dict.fromkeys(whole, whole))
    return whole is not None


def _has_learned_rows(flow: TokenFlow, node: ir.Node) -> bool:
    """Whether a node adds learned rows to the tokens; its axes are noted if so."""
    try:
        links = axis_links(flow.shapes.call(node))
        if links is None or (links.joined is None and not links.padded):
            return False
        _propagate(flow, node, with_learned_rows)
    except (UnsupportedError, UntraceableAxesError):
        return False
    return True


def _propagate(flow: TokenFlow, node: ir.Node, rule: Rule) -> None:
    visit = NodeVisit(flow, flow.shapes.call(node))
    try:
        links = _links(visit)
        found = rule(visit, links)
        check_batch(visit, links)
        for value, fact, axes in zip(node.outputs, visit.call.results, found, strict=False):
            if fact.shape is not None:
                _check_lengths(visit, fact.shape, axes)
            flow.axes[value] = axes
        if _is_relative_to_range(visit):
            flow.per_call.update(node.outputs)
    except Exception as error:
        raise_at(node, error)
    if flow.last and any(value in flow.last for value in node.inputs):
        _check_last(visit, found)


def _is_relative_to_range(visit: NodeVisit) -> bool:
    """Return whether the numbers of a result count steps of a range of one call: no scale is applied to them yet."""
    flow = visit.flow
    read = [value for index in visit.tokens if (value := visit.node.inputs[index]) is not None]
    if not any(value in flow.per_call for value in read):
        return False
    types = [flow.shapes[value].dtype for value in read if flow.is_range(value)]
    is_scaled = any(dtype is not None and dtype.is_floating_point() for dtype in types)
    return len(types) == len(read) or not is_scaled


def _links(visit: NodeVisit) -> AxisLinks:
    try:
        links = axis_links(visit.call)
    except UntraceableAxesError as error:
        raise visit.refusal(str(error)) from error
    if links is None:
        raise _no_links(visit)
    return links


def _no_links(visit: NodeVisit) -> UnsupportedError:
    node = visit.node
    if any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values()):
        return visit.refusal("cannot trace the sequence axis through control flow", code=Code.CONTROL_FLOW)
    if has_trait(node, Trait.RECURRENT):
        return visit.mixing()
    if has_trait(node, Trait.ROUTING):
        return visit.refusal(
            "it selects tokens by content, and which of them are put back is unknown", code=Code.MIXES_TOKENS,
            hint="experts that drop tokens beyond a capacity depend on the other tokens",
        )  # fmt: skip
    name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    hint = _OPERATOR_HINT if node.domain not in KNOWN_DOMAINS else _DECOMPOSE_HINT
    return visit.refusal(f"unknown operator {name} on token data", hint=hint, code=Code.UNKNOWN_OPERATOR)


def _check_lengths(visit: NodeVisit, shape: tuple[Dimension, ...], axes: Axes) -> None:
    traced = {axis.axis for axis in axes}
    for place, size in enumerate(shape):
        if place not in traced and visit.holds_length(size):
            raise visit.refusal("cannot trace the sequence axis", found=f"axis {place} of size {size}")
    for axis in axes:
        if axis.variable.resolved() is not Length.NEW:
            continue
        whole = axis.size(visit.flow.length)
        if not dim.is_equal(whole, shape[axis.axis]):
            raise visit.refusal(
                "it keeps only some of the tokens", expected=f"axis {axis.axis} of size {whole}",
                found=str(shape[axis.axis]), hint=visit.fixed_length_hint(shape[axis.axis]),
            )  # fmt: skip


def _check_last(visit: NodeVisit, found: list[Axes]) -> None:
    """Check that values computed from the last token alone do not reach other tokens."""
    if any(found):
        raise visit.refusal("a value computed from the last token reaches all tokens")
    visit.flow.last.update(visit.node.outputs)


def _check_outputs(flow: TokenFlow) -> None:
    """Check that outputs of a fixed length do not hold features before tokens on one axis, as a wrong reshape does.

    A caller would have to know how many tokens a call has to tell which number is whose.

    Raises:
        UnsupportedError: One does.
    """
    if not isinstance(flow.length, int):
        return
    for value, axes in flow.axes.items():
        mixed = next((axis for axis in axes if axis.outer not in (1, flow.batch)), None)
        if mixed is not None and value.is_graph_output():
            raise UnsupportedError(
                "an output has several features before the tokens on one axis", code=Code.UNTRACEABLE_SEQUENCE,
                at=value.name, expected="an axis of tokens", found=f"{mixed.outer} times as many numbers",
            )  # fmt: skip


def _check_variables(flow: TokenFlow) -> None:
    for place in flow.other_inputs:
        if flow.operands[place].resolved() is None:
            flow.operands[place].root().length = Length.NEW  # no product made them keys
    for score in flow.scores:
        for variable in (score.left_variable.root(), score.right_variable.root()):
            if variable.length is None:
                raise UnsupportedError(
                    "two sequence axes meet, but neither is summed against values", code=Code.NO_ATTENTION,
                    at=score.node.outputs[0].name, expected="weights @ values, as in attention",
                )  # fmt: skip
        if score.left_variable.resolved() is score.right_variable.resolved():
            raise UnsupportedError(
                "cannot distinguish queries from keys", at=score.node.outputs[0].name, code=Code.NO_ATTENTION
            )
    for place, variable in flow.operands.items():
        mixes = variable.resolved() is Length.NEW and variable.root().mixed_at
        if mixes or (place in flow.learned_row_inputs and variable.resolved() is None):
            raise UnsupportedError(
                "an operator mixes tokens along the axis of the queries, so a KV cache is not enough",
                at=variable.root().mixed_at[0],
                code=Code.MIXES_TOKENS,
            )
