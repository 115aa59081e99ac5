"""Sequence states: operators outside attention whose result depends on earlier tokens.

Convolutions, token shifts and running sums are such operators. Their inputs are cached like keys, and they are computed
again over all tokens so far. The result of a token must not depend on any later token, nor on another sequence. Axis
links decide that for most operators. Only where they do not, as for a matrix of decays, are the operators run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.axis_propagation import check_batch
from kvsurgeon.analysis.cache_points import bottlenecks, choose_cache_point, is_no_table_lookup
from kvsurgeon.analysis.mask_patterns import (
    LONG_PADDING,
    MaskPattern,
    is_close,
    left_padded,
    padded_until,
    sequence_last,
    unmasked,
    with_gaps,
)
from kvsurgeon.analysis.probe_inputs import AMPLIFIED, Rows, batch_axis
from kvsurgeon.analysis.regions.probe_lengths import changing_context, lengths_beyond
from kvsurgeon.analysis.regions.token_ranges import token_range
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.token_data import growing_regions, is_closed_but_for_shapes, is_token, with_upstream
from kvsurgeon.analysis.token_flow import PER_CALL, NodeVisit, Place, SequenceState, TokenFlow
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.ops.operator import Trait, UntraceableAxesError
from kvsurgeon.ops.table import axis_links, contraction_of, has_trait
from kvsurgeon.symbolic.dimension import BATCH, LENGTH
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis

STATE_IS_CAUSAL = "state outside attention depends on no later token (measured on probe inputs)"
_MAX_NODES = 12  # between the inputs of a state and its result
_TOKENS = 65  # of a text, unless a number in the region is larger
_SEQUENCES = 5  # of a batch, whose number context may compare with
_PREFIXES = (1, 2, 7, 8, 33, 40)  # tokens that stay the same while later ones change
_LARGE = 30.0  # scale of a run with large values
_PADDED = padded_until(LONG_PADDING)

Run = Callable[..., np.ndarray]  # tokens and mask -> [..., token]


def find_sequence_state(flow: TokenFlow, start: ir.Node) -> SequenceState | None:
    """Return the smallest region from a node that mixes tokens whose result depends on no later token; None if none.

    The inputs of the region can be cached, and only its result is read elsewhere.
    """
    for readers in growing_regions(flow, start):
        grown = [node for node in readers if node in flow.read_for_content and is_token(flow, node.outputs[0])]
        if readers[-1] not in grown:
            continue  # it reads the shape of a result
        if len(grown) > _MAX_NODES or is_boundary(grown[-1]) or _multiplies_tokens(flow, grown[-1]):
            return None
        region = with_siblings(flow, grown)
        if is_closed_but_for_shapes(flow, region) and not any(map(is_boundary, region)):
            state = _state_of(flow, region)
            if state is not None:
                return state
    return None


def _multiplies_tokens(flow: TokenFlow, node: ir.Node) -> bool:
    """Return whether a node is a product of token data with token data, as attention is."""
    product = contraction_of(flow.shapes.call(node)) if has_trait(node, Trait.PRODUCT) else None
    return product is not None and all(is_token(flow, node.inputs[place]) for place in (product.left, product.right))


def record_sequence_state(flow: TokenFlow, state: SequenceState) -> None:
    """Record that a result needs the inputs of its region for all tokens so far, or a state of fixed size."""
    variable = LengthVariable(Length.TOTAL, at=state.result.name or "")
    for node in state.nodes:
        flow.targets.pop(node, None)
        for notes in (flow.demands, flow.parameters, flow.operands):
            for place in [place for place in notes if place[0] is node]:
                notes.pop(place)
    if state.recurrent is None:
        flow.operands.update(dict.fromkeys(state.places, variable))
    flow.states.append(state)
    flow.state_nodes.update(state.nodes)
    flow.axes[state.result] = state.axes
    if state.measured and state.recurrent is None:
        flow.assumed.setdefault(STATE_IS_CAUSAL, state.result.name or "")


def reads_masked_tokens(flow: TokenFlow, state: SequenceState, mask: MaskPattern, assumptions: dict[str, str]) -> bool:
    """Return whether the result of visible tokens depends on the content of masked tokens."""
    sources = []
    for node, index in state.places:
        value = node.inputs[index]
        assert value is not None
        sources.append([value, *bottlenecks(flow, [value], is_no_table_lookup)][-1])
    tokens = np.arange(_TOKENS)
    try:
        _, run = state_runner(flow, state, sources, assumptions)
        for pattern in (mask, _PADDED):
            visible = pattern(_TOKENS)
            results = [run(text, pattern) for text in (tokens, np.where(visible, tokens, tokens + AMPLIFIED))]
            if not is_close(*(result[..., visible] for result in results)):
                return True
    except Exception:  # whatever onnxruntime raises
        return True
    return False


def with_siblings(flow: TokenFlow, region: Sequence[ir.Node]) -> list[ir.Node]:
    """Return a region with nodes whose results it reads.

    These are ranges of dynamic quantization, what reads the last token alone, and what is not traced. Of the latter it
    is not known either whether they mix tokens.
    """

    def belongs(value: ir.Value) -> bool:
        return is_token(flow, value) and (value not in flow.axes or value in flow.last or flow.is_range(value))

    return with_upstream(flow, region, belongs)


def is_boundary(node: ir.Node) -> bool:
    """Return whether a node has a subgraph or a graph output, so that no state contains it."""
    has_subgraph = any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values())
    return has_subgraph or any(value.is_graph_output() for value in node.outputs)


def places_of(flow: TokenFlow, region: Sequence[ir.Node]) -> list[Place]:
    """Return the inputs of the nodes of a region that hold token data which no node of it computes."""
    inside = set(region)
    return [
        (node, index)
        for node in region
        for index, value in enumerate(node.inputs)
        if value is not None and is_token(flow, value) and value.producer() not in inside
    ]


def _state_of(flow: TokenFlow, region: Sequence[ir.Node]) -> SequenceState | None:
    places = places_of(flow, region)
    is_fixed = isinstance(flow.length, int)
    axes = _traced_axes(flow, region, places) if is_fixed else result_axes(flow, region[-1].outputs[0])
    if not axes or not places or not all(has_new_tokens(flow, node.inputs[index]) for node, index in places):
        return None
    state = SequenceState(nodes=tuple(region), places=tuple(places), axes=axes)
    try:
        for place in places:
            choose_cache_point(flow, place)
    except UnsupportedError:
        return None
    causal = _is_causal(flow, state)
    if causal is not None:
        return state if causal else None
    if is_fixed or not _is_measured_causal(flow, state):
        return None  # one length shows nothing
    return replace(state, measured=True)


def result_axes(flow: TokenFlow, value: ir.Value) -> Axes:
    """Return the only axis whose size is the length."""
    shape = flow.shapes[value].shape or ()
    found = [place for place, size in enumerate(shape) if LENGTH in getattr(size, "free_symbols", ())]
    if len(found) != 1 or shape[found[0]] is not flow.length:
        return ()
    return (SequenceAxis(found[0], flow.query_axis),)


def _traced_axes(flow: TokenFlow, region: Sequence[ir.Node], places: Sequence[Place]) -> Axes:
    """Return the axis that holds the tokens by the axis links: of a fixed length, other axes may have the same size."""
    if not all(has_new_tokens(flow, node.inputs[index]) for node, index in places):
        return ()
    found, shape = token_range(flow, region, places), flow.shapes[region[-1].outputs[0]].shape
    if found is None or found.axis is None or shape is None or shape[found.axis] != flow.length:
        return ()
    return (SequenceAxis(found.axis, flow.query_axis),)


def has_new_tokens(flow: TokenFlow, value: ir.Value | None) -> bool:
    """Return whether the only sequence axis of a value is that of the new tokens."""
    axes = () if value is None else flow.axes.get(value, ())
    return len(axes) == 1 and axes[0].is_plain and axes[0].variable.resolved() is Length.NEW


def _is_causal(flow: TokenFlow, state: SequenceState) -> bool | None:
    """Return whether the axis links show that no element of the result depends on a later token; None if unknown."""
    for node in state.nodes:
        visit = NodeVisit(flow, flow.shapes.call(node))
        try:
            links = axis_links(visit.call)
            if links is not None and links.dynamic_range:
                visit.assume(PER_CALL)
            if links is not None and links.addressing != "scatter_nd":  # its indices are run
                check_batch(visit, links)
        except UntraceableAxesError:
            continue
        except UnsupportedError:
            return False
    found = token_range(flow, state.nodes, state.places)
    if found is None or (found.is_causal and found.reads_context):
        return None
    return found.is_causal


def _is_measured_causal(flow: TokenFlow, state: SequenceState) -> bool:
    """Return whether the result of a token is the same for other, more or fewer later tokens and other sequences."""
    sources = [value for node, index in state.places if (value := node.inputs[index]) is not None]
    lengths = lengths_beyond(flow, state.result, sources)
    if lengths is None:
        return False
    try:
        runner, run = state_runner(flow, state, sources, flow.assumed)
        if runner.reads_numbers:
            return False
        masks = (left_padded, with_gaps) if runner.masks else ()
        positions, changing = changing_context(flow, state.nodes)
        longer = sorted(length for length in {*lengths, *changing} if length > _TOKENS)
        shorter = {*lengths, *changing} - {*longer, _TOKENS}
        for mask, scale in ((unmasked, 1.0), (unmasked, _LARGE), *((mask, 1.0) for mask in masks)):
            if not _keeps_prefixes(partial(run, mask=mask, scale=scale), _TOKENS, shorter):
                return False
        if positions and not _keeps_prefixes(run, max(positions) + 2, positions):
            return False
        return all(
            _keeps_prefixes(partial(run, mask=mask), length) for length in longer for mask in (unmasked, *masks)
        ) and _keeps_sequences_apart(flow, runner, state.result)
    except Exception:  # whatever onnxruntime raises
        return False


def _keeps_prefixes(run: Run, length: int, positions: Collection[int] = ()) -> bool:
    """Return whether tokens have the same results if later tokens are dropped, replaced or amplified."""
    tokens = np.arange(length)
    whole = run(tokens)
    for prefix in {*(_PREFIXES if length == _TOKENS else (1, length // 2)), length - 2, length - 1, *positions}:
        others = np.where(tokens < prefix, tokens, tokens + length)
        amplified = np.where(tokens < prefix, tokens, tokens + AMPLIFIED)
        for text in (tokens[:prefix], others, amplified):
            if not is_close(whole[..., :prefix], run(text)[..., :prefix]):
                return False
    return True


def _keeps_sequences_apart(flow: TokenFlow, runner: SubgraphRunner, result: ir.Value) -> bool:
    """Return whether the result of one sequence of a batch is the same next to another second sequence."""
    axis, tokens = batch_axis(flow.shapes[result].shape), np.arange(_TOKENS)
    if axis is None:
        return batch_axis([flow.batch]) is None
    results = [
        runner.run(_TOKENS, tokens=tokens, second_tokens=second)[0]
        for second in (tokens, tokens + _TOKENS, tokens + AMPLIFIED)
    ]
    first = range(results[0].shape[axis] // 2)
    return all(is_close(results[0].take(first, axis), array.take(first, axis)) for array in results[1:])


def state_runner(
    flow: TokenFlow, state: SequenceState, sources: Sequence[ir.Value], assumptions: dict[str, str]
) -> tuple[SubgraphRunner, Run]:
    """Return a runner of the state's result from its sources, and a function that returns the result's tokens last."""
    runner = SubgraphRunner(flow, [state.result], probed=sources, assumptions=assumptions, fixed_ranges=True)
    batch = _SEQUENCES if flow.batch is BATCH else 2

    def run(tokens: np.ndarray, mask: MaskPattern = unmasked, scale: float = 1.0) -> np.ndarray:
        array = runner.run(len(tokens), mask, batch=batch, tokens=tokens, scale=scale)[0]
        return sequence_last(array, state.axes, Rows(0, len(tokens), len(tokens), batch))

    return runner, run
