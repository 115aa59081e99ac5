"""Windows of sequence states: how many earlier tokens a result depends on, where that is a fixed number.

The cache then holds the last rows alone, as many as the window has earlier tokens, and as many rows of zeros before a
text. Axis links give the window; where they do not, as for windows that are gathered by index, it is measured. Either
way a text is run in two pieces, the second with the last rows of the first, and so is one after rows of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.cache_points import CachePoint, choose_cache_point
from kvsurgeon.analysis.mask_patterns import is_close
from kvsurgeon.analysis.probe_inputs import AMPLIFIED, BLANK
from kvsurgeon.analysis.regions.probe_lengths import changing_context, lengths_beyond
from kvsurgeon.analysis.regions.sequence_state import Run, state_runner
from kvsurgeon.analysis.regions.token_ranges import token_range
from kvsurgeon.analysis.token_data import token_inputs
from kvsurgeon.analysis.token_flow import Place, SequenceState, TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.graph.query import producers, upstream
from kvsurgeon.ops.content import content_inputs

ZEROS_ARE_NO_TOKENS = "rows of zeros before a text count as no tokens in a state (measured on probe inputs)"
_TOKENS = 65  # of a text whose influence on its last token is measured
_MEASURED = 32  # earlier tokens of a window that is measured


@dataclass(frozen=True, kw_only=True)
class StateWindow:
    """States whose results depend on the last rows of the same cached tensors.

    Attributes:
        rows: Number of earlier tokens.
        points: The cached tensors.
        states: The states, computed on these rows and the new tokens.
    """

    rows: int
    points: tuple[CachePoint, ...]
    states: tuple[SequenceState, ...]


def find_windows(flow: TokenFlow, attended: Collection[ir.Value]) -> tuple[StateWindow, ...]:
    """Return the windows of the states whose cached tensors nothing else needs for all tokens.

    Args:
        flow: The token flow.
        attended: The tensors that attention caches.
    """
    found = []
    for states in _groups(flow):
        points = {point.value: point for state in states for point in _points(flow, state)}
        if not points.keys().isdisjoint(attended):
            continue
        rows = [_window(flow, state, points) for state in states]
        if all(rows):
            found.append(StateWindow(rows=max(filter(None, rows)), points=tuple(points.values()), states=states))
    return tuple(found)


def _points(flow: TokenFlow, state: SequenceState) -> list[CachePoint]:
    return [choose_cache_point(flow, place) for place in state.places]


def _groups(flow: TokenFlow) -> Iterator[tuple[SequenceState, ...]]:
    """Yield the states in groups, each with all states that share a cached tensor with another one of it."""
    pending = {state.result: state for state in flow.cached_states}
    while pending:
        group = [pending.pop(next(iter(pending)))]
        for state in group:
            values = {point.value for point in _points(flow, state)}
            joined = [other for other in pending.values() if values & {one.value for one in _points(flow, other)}]
            group += [pending.pop(other.result) for other in joined]
        yield tuple(sorted(group, key=lambda state: flow.order[state.nodes[0]]))


def _window(flow: TokenFlow, state: SequenceState, points: Collection[ir.Value]) -> int | None:
    """Return the number of earlier tokens that a result depends on, at least 1; None if it is not known to be fixed."""
    nodes, places = _computed(flow, state, points)
    if any(not axis.is_plain for value in points for axis in flow.axes[value]) or _reads_inputs(flow, nodes):
        return None
    sources = [value for node, index in places if (value := node.inputs[index]) is not None]
    found = token_range(flow, nodes, places)
    if found is not None and (found.last > 0 or not math.isfinite(found.first)):
        return None
    try:
        _, run = state_runner(flow, state, sources, {})
        rows = _measured_window(run) if found is None else max(1, -int(found.first))
        is_decided = found is not None and not found.reads_context
        lengths = [] if is_decided else _lengths(flow, state, sources, nodes)
        if rows is None or lengths is None or not all(_is_cut(run, rows, length) for length in (rows + 3, *lengths)):
            return None
    except Exception:  # whatever onnxruntime raises
        return None
    flow.assumed.setdefault(ZEROS_ARE_NO_TOKENS, state.result.name or "")
    return rows


def _computed(flow: TokenFlow, state: SequenceState, points: Collection[ir.Value]) -> tuple[list[ir.Node], list[Place]]:
    """Return the nodes between cached tensors and result, in order, and their inputs that are cached tensors."""
    operands = [node.inputs[index] for node, index in state.places]
    walked = upstream(operands, stop=points.__contains__, inputs=lambda node: token_inputs(flow, node))
    between = producers(value for value in walked if value not in points)
    nodes = sorted({*between, *state.nodes}, key=lambda node: flow.order[node])
    return nodes, [(node, index) for node in nodes for index, value in enumerate(node.inputs) if value in points]


def _reads_inputs(flow: TokenFlow, nodes: Sequence[ir.Node]) -> bool:
    """Return whether nodes read context that the content of an input decides: it is known for the text alone."""
    read = [value for node in nodes for value in node.inputs if flow.kinds.get(value) is ValueKind.CONTEXT]  # type: ignore[arg-type]
    given = {one.value for one in flow.inputs}
    return any(value in given for value in upstream(read, inputs=content_inputs))


def _lengths(
    flow: TokenFlow, state: SequenceState, sources: Sequence[ir.Value], nodes: Sequence[ir.Node]
) -> list[int] | None:
    """Return lengths of texts beyond which context may change; None if one is longer than texts that can be run."""
    beyond = lengths_beyond(flow, state.result, sources)
    positions, lengths = changing_context(flow, nodes)
    return None if beyond is None else sorted({*beyond, *(position + 2 for position in positions), *lengths})


def _measured_window(run: Run) -> int | None:
    """Return the distance of the earliest token that has an influence on the last one; None for a long one."""
    tokens, last = np.arange(_TOKENS), _TOKENS - 1
    whole = run(tokens)[..., last]
    for distance in range(last, 0, -1):
        changed = run(np.where(tokens == last - distance, tokens + AMPLIFIED, tokens))[..., last]
        if not np.array_equal(whole, changed):
            return distance if distance <= _MEASURED else None
    return None


def _is_cut(run: Run, rows: int, length: int) -> bool:
    """Return whether a text gives the same in two pieces, and after rows of zeros."""
    tokens, blank = np.arange(length), np.full(rows, BLANK)
    whole = run(tokens)
    for cut in {0, 1, length // 2, length - 1}:
        before = np.concatenate([blank, tokens[:cut]])[-rows:]
        if not is_close(whole[..., cut:], run(np.concatenate([before, tokens[cut:]]))[..., rows:]):
            return False
    return all(is_close(whole[..., :count], run(tokens[:count])) for count in (1, min(rows, length)))
