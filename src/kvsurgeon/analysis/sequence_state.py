"""Operators outside attention by which a token sees those before it: convolutions, shifts, running sums.

What they read is remembered as keys are, and they are computed again over all tokens so far. No rule says of which
operators that is right: they are run, and what they make of a token may depend on nothing that comes after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.cache_points import bottlenecks, choose, looks_nothing_up
from kvsurgeon.analysis.mask_patterns import Pattern, all_seen, close, left_padded, unfolded, with_holes
from kvsurgeon.analysis.probe_inputs import batch_axis
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.token_flow import SequenceState, TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.symbolic.dimension import LENGTH
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis

SEEN = "state outside attention: that it depends on no later token was seen by running it"
_LONGEST = 8  # nodes that may make one result
_TOKENS = 65  # of the longest text that is run
_SHORTER = (1, 2, 7, 40)
_LOUD = 30.0  # times the usual noise
_CUTS = (1, 8, 33)  # places from which on other tokens follow


def find_sequence_state(flow: TokenFlow, start: ir.Node) -> SequenceState | None:
    """The fewest nodes, from one that mixes tokens on, whose result depends on no later token; None where none does.

    They read tensors that can be remembered, and of what they make only the result is read elsewhere.
    """
    if isinstance(flow.length, int):
        return None
    region, made = [start], set(start.outputs)
    for node in list(flow.order)[flow.order[start] :]:
        if node is not start and not any(value in made for value in node.inputs):
            continue
        if node is not start:
            region.append(node)
            made.update(node.outputs)
        if len(region) > _LONGEST or any(value.is_graph_output() for value in node.outputs) or _has_graph(node):
            return None
        if _is_closed(region, made) and (found := _recall(flow, region, made)) is not None:
            return found
    return None


def record_sequence_state(flow: TokenFlow, recall: SequenceState) -> None:
    """Note that a result needs what it is made of for all tokens so far."""
    role = LengthVariable(Length.TOTAL, at=recall.result.name or "")
    for node in recall.nodes:
        flow.targets.pop(node, None)
        for notes in (flow.demands, flow.parameters, flow.operands):
            for place in [place for place in notes if place[0] is node]:
                notes.pop(place)
    flow.operands.update(dict.fromkeys(recall.places, role))
    flow.states.append(recall)
    flow.axes[recall.result] = recall.axes
    flow.assumed.setdefault(SEEN, recall.result.name or "")


def sees_masked(flow: TokenFlow, recall: SequenceState, pattern: Pattern) -> bool:
    """Whether what is made of tokens that are not masked depends on what is in those that an input masks."""
    sources = []
    for place in recall.places:
        value = place[0].inputs[place[1]]
        assert value is not None
        sources.append([value, *bottlenecks(flow, [value], looks_nothing_up)][-1])
    try:
        experiment = _experiment(flow, recall, sources)
        seen = pattern(_TOKENS)
        places = np.arange(_TOKENS)
        mine, theirs = (
            _rows(experiment, recall, at, pattern) for at in (places, np.where(seen, places, places + _TOKENS))
        )
    except Exception:  # whatever onnxruntime says: it was not shown
        return True
    return not close(mine[..., seen], theirs[..., seen])


def _has_graph(node: ir.Node) -> bool:
    return any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values())


def _is_closed(region: Sequence[ir.Node], made: set[ir.Value]) -> bool:
    """Whether only the result of the last node is read elsewhere."""
    inside = set(region)
    return all(user in inside for value in made - set(region[-1].outputs[:1]) for user, _ in value.uses())


def _recall(flow: TokenFlow, region: Sequence[ir.Node], made: set[ir.Value]) -> SequenceState | None:
    places = [
        (node, index)
        for node in region
        for index, value in enumerate(node.inputs)
        if value is not None and value not in made and flow.kinds.get(value) is ValueKind.TOKEN
    ]
    axes = _tokens_in(flow, region[-1].outputs[0])
    if not axes or not places or not all(_is_stream(flow, node.inputs[index]) for node, index in places):
        return None
    found = SequenceState(nodes=tuple(region), places=tuple(places), axes=axes)
    try:
        for place in places:
            choose(flow, place)
    except UnsupportedError:
        return None
    return found if _depends_on_no_later_token(flow, found) else None


def _tokens_in(flow: TokenFlow, value: ir.Value) -> Axes:
    """The one axis of a result that is as long as the stream."""
    shape = flow.shapes[value].shape or ()
    held = [place for place, size in enumerate(shape) if LENGTH in getattr(size, "free_symbols", ())]
    if len(held) != 1 or shape[held[0]] is not flow.length:
        return ()
    return (SequenceAxis(held[0], flow.stream),)


def _is_stream(flow: TokenFlow, value: ir.Value | None) -> bool:
    axes = () if value is None else flow.axes.get(value, ())
    return len(axes) == 1 and axes[0].is_plain and axes[0].role.resolved() is Length.NEW


def _depends_on_no_later_token(flow: TokenFlow, recall: SequenceState) -> bool:
    """Whether what is said of a token stays as it is when other tokens follow, or more, or fewer, or stand beside."""
    values = [value for node, index in recall.places if (value := node.inputs[index]) is not None]
    places = np.arange(_TOKENS)
    try:
        experiment = _experiment(flow, recall, values)
        masked = (left_padded, with_holes) if experiment.masks else ()
        for pattern, loudness in ((all_seen, 1.0), (all_seen, _LOUD), *((pattern, 1.0) for pattern in masked)):
            whole = _rows(experiment, recall, places, pattern, loudness)
            others = [(cut, np.where(places < cut, places, places + _TOKENS)) for cut in _CUTS]
            for shared, text in [*((length, places[:length]) for length in _SHORTER), *others]:
                rows = _rows(experiment, recall, text, pattern, loudness)
                if not close(whole[..., :shared], rows[..., :shared]):
                    return False
        return _keeps_sequences_apart(flow, experiment, recall.result)
    except Exception:  # whatever onnxruntime says: it was not seen
        return False


def _keeps_sequences_apart(flow: TokenFlow, experiment: SubgraphRunner, result: ir.Value) -> bool:
    """Whether what is said of one sequence of a batch stays as it is when the other is another."""
    axis, places = batch_axis(flow.shapes[result].shape), np.arange(_TOKENS)
    if axis is None:
        return batch_axis([flow.batch]) is None
    alone, beside = (
        experiment.run(_TOKENS, all_seen, places=places, beside=other)[0] for other in (places, places + _TOKENS)
    )
    first = range(alone.shape[axis] // 2)
    return close(alone.take(first, axis), beside.take(first, axis))


def _experiment(flow: TokenFlow, recall: SequenceState, values: Sequence[ir.Value]) -> SubgraphRunner:
    return SubgraphRunner(
        flow=flow, inputs=flow.inputs, opsets=flow.opsets, outputs=[recall.result], stand_ins=frozenset(values)
    )


def _rows(
    experiment: SubgraphRunner, recall: SequenceState, places: np.ndarray, pattern: Pattern, loudness: float = 1.0
) -> np.ndarray:
    """[..., token]: the result for tokens that belong to these places."""
    array = experiment.run(len(places), pattern, places=places, loudness=loudness)[0]
    return unfolded(array, recall.axes, len(places))
