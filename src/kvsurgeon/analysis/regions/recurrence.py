"""Linear recurrences over chunks of tokens: regions that pass a state from chunk to chunk, which starts with zeros.

Such a region pads the tokens to whole chunks, computes a state of each chunk, joins zeros in front of them and
multiplies all by decays. What takes the place of the zeros is the state before the text, and the last row of the
product is the state after it. Which product that is, is found by running the region: two pieces of a text
must give the result of the whole, for any state before it, at cuts within and between chunks.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import sympy

from kvsurgeon.analysis.mask_patterns import sequence_last
from kvsurgeon.analysis.probe_inputs import Rows
from kvsurgeon.analysis.regions.probe_lengths import lengths_beyond
from kvsurgeon.analysis.regions.sequence_state import has_new_tokens, is_boundary, places_of, result_axes, with_siblings
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.token_data import growing_regions, is_closed_but_for_shapes, is_token
from kvsurgeon.analysis.token_flow import RecurrentState, SequenceState, TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.query import downstream, is_operator, producers, upstream
from kvsurgeon.graph.value_numbering import ValueNumbering, content_key
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic.dimension import BATCH

TWO_PIECES_ARE_ONE = "a recurrent state gives in two pieces what it gives in one (measured on probe inputs)"
_MAX_NODES = 400  # of token data in a region
_MAX_CANDIDATES = 8  # products that may be the state
_SCALES = (0.25, 0.05)  # of probe inputs: decays are exponential
_CLOSE = 2e-3  # difference of sums in another order, as a part of the largest number of a token
_MAX_CONSTANT = 1 << 18  # elements of a constant that is compared with others
_VISIBLE = 1e-2  # influence of the state before a text, as a part of the spread of its results

_Found = tuple[np.ndarray, np.ndarray]  # the results, tokens last, and the state after them


def find_recurrence(flow: TokenFlow, start: ir.Node) -> SequenceState | None:
    """Return the smallest region from a node that passes a state from token to token; None if none does."""
    if isinstance(flow.length, int):
        return None
    for grown in growing_regions(flow, start):
        if len(grown) > _MAX_NODES or is_boundary(grown[-1]):
            return None
        axes = result_axes(flow, grown[-1].outputs[0])
        region = with_siblings(flow, grown) if axes else []
        if (
            not 0 < len(region) <= _MAX_NODES
            or not is_closed_but_for_shapes(flow, region)
            or any(map(is_boundary, region))
        ):
            continue
        if not all(divisor.is_Integer for divisor in _divisors(flow, region)):
            continue  # the number of tokens of a chunk is no constant
        places = places_of(flow, region)
        if region[-1] is not grown[-1] or not all(has_new_tokens(flow, node.inputs[index]) for node, index in places):
            continue
        state = SequenceState(nodes=tuple(region), places=tuple(places), axes=axes, measured=True)
        for recurrent in _candidates(flow, state):
            key = _key(flow, state, recurrent)
            if key not in flow.recurrence_verdicts:
                flow.recurrence_verdicts[key] = _is_state(flow, state, recurrent)
            if flow.recurrence_verdicts[key]:
                flow.assumed.setdefault(TWO_PIECES_ARE_ONE, state.result.name or "")
                return SequenceState(
                    nodes=state.nodes, places=state.places, axes=state.axes, measured=True, recurrent=recurrent
                )
    return None


def _key(flow: TokenFlow, state: SequenceState, recurrent: RecurrentState) -> Hashable:
    """Return a key of what a region computes: equal for layers that differ in their weights alone.

    A weight is a vector of floats that is not as long as a chunk; other constants may mask tokens or chunks.
    """
    chunks, start = chunk_lengths(flow, state), recurrent.start[0].inputs[0]
    sources = {node.inputs[index]: number for number, (node, index) in reversed(list(enumerate(state.places)))}

    def leaf(value: ir.Value) -> Hashable | None:
        fact = flow.shapes.facts.get(value)
        if value is start or value in sources:
            return "input", sources.get(value, -1), fact and (fact.shape, fact.dtype)
        tensor = constant_tensor(value)
        if tensor is not None:
            sizes = [size for size in tensor.shape.numpy() if size != 1]
            is_vector = tensor.dtype.is_floating_point() and len(sizes) == 1 and sizes[0] not in chunks
            if is_vector:
                return "weight", str(tensor.dtype), tensor.shape.numpy()
            return (content_key(tensor) if tensor.size <= _MAX_CONSTANT else None) or value
        if fact is None or fact.value is None:
            return None
        return fact.dtype, fact.value.shape, tuple(fact.value.reshape(-1))

    numbering = ValueNumbering(leaf, keys=flow.region_numbers)
    return numbering[state.result], numbering[recurrent.value], recurrent.axis


def _candidates(flow: TokenFlow, state: SequenceState) -> Iterator[RecurrentState]:
    """Yield the values of a region that may be its state after each chunk."""
    joins = [node for node in state.nodes if _joins_one_row(flow, node)]
    if len(joins) != 1 or _reads_more_than_sizes(flow, state.nodes):
        return
    (join,) = joins
    shape, axis = flow.shapes[join.outputs[0]].shape or (), join.attributes["axis"].as_int()
    axis += len(shape) if axis < 0 else 0
    first = join.inputs[0]
    sizes = [size for place, size in enumerate(flow.shapes[first].shape or ()) if place != axis] if first else []
    if not axis or len(sizes) < 2 or sizes[0] is not BATCH or not all(isinstance(size, int) for size in sizes[1:]):
        return
    inside = set(state.nodes)
    values = downstream(join.outputs[:1], stop=lambda node: node not in inside)
    fitting = [value for value in values if value is not join.outputs[0] and flow.shapes[value].shape == shape]
    for value in fitting[:_MAX_CANDIDATES]:
        yield RecurrentState(start=(join, 0), value=value, axis=axis, sizes=tuple(sizes))


def _joins_one_row(flow: TokenFlow, node: ir.Node) -> bool:
    """Return whether a node joins a row of context, which nothing else reads, in front of token data."""
    if not is_operator(node, "Concat") or len(node.inputs) != 2 or not is_token(flow, node.inputs[1]):
        return False
    first = node.inputs[0]
    shape = None if first is None else flow.shapes[first].shape
    if first is None or shape is None or flow.kinds.get(first) is not ValueKind.CONTEXT:
        return False
    return shape[node.attributes["axis"].as_int()] == 1 and len(list(first.uses())) == 1


def _reads_more_than_sizes(flow: TokenFlow, nodes: Sequence[ir.Node]) -> bool:
    """Return whether nodes read context of more than sizes: the content of an input, or rows of a constant table."""
    read = [value for node in nodes for value in node.inputs if value and flow.kinds.get(value) is ValueKind.CONTEXT]
    walked = list(upstream(read, inputs=content_inputs))
    given = {one.value for one in flow.inputs}
    tables = (
        node
        for node in producers(walked)
        if has_trait(node, Trait.LOOKUP, Trait.SELECT) and flow.kinds.get(node.outputs[0]) is ValueKind.CONTEXT
        for value in node.inputs[:1]
        if value is not None and flow.kinds.get(value, ValueKind.CONSTANT) is ValueKind.CONSTANT
    )
    return any(value in given for value in walked) or next(tables, None) is not None


@dataclass(kw_only=True)
class _Scan:
    """A region with its state as an input and an output, on probe inputs."""

    runner: SubgraphRunner
    state: SequenceState
    recurrent: RecurrentState
    scale: float

    def run(self, tokens: np.ndarray, before: np.ndarray, second: np.ndarray | None = None) -> _Found:
        """Return the results, tokens last, and the state after them."""
        start = self.recurrent.start[0].inputs[0]
        assert start is not None
        self.runner.inputs.give(start.name or "", lambda _rows: before)
        result, states = self.runner.run(len(tokens), tokens=tokens, second_tokens=second, scale=self.scale)
        if not (np.isfinite(result).all() and np.isfinite(states).all()):
            raise FloatingPointError
        rows = sequence_last(result, self.state.axes, Rows.of_text(len(tokens)))
        return rows, states.take([-1], self.recurrent.axis)

    def random_state(self, seed: int) -> np.ndarray:
        """Return a state as large as the probe inputs."""
        sizes = [2, *self.recurrent.sizes[1:]]
        assert self.recurrent.axis is not None
        sizes.insert(self.recurrent.axis, 1)
        dtype = (self.runner.flow.shapes[self.recurrent.value].dtype or ir.DataType.FLOAT).numpy()
        return (self.scale * np.random.default_rng(seed).standard_normal(sizes)).astype(dtype)


def _is_state(flow: TokenFlow, state: SequenceState, recurrent: RecurrentState) -> bool:
    """Return whether a value of a region is its state after each chunk."""
    sources = list(dict.fromkeys(value for node, index in state.places if (value := node.inputs[index]) is not None))
    start = recurrent.start[0].inputs[0]
    lengths = lengths_beyond(flow, state.result, sources)
    if lengths is None or start is None:
        return False
    try:
        whole = SubgraphRunner(flow, [state.result], probed=sources)
        runner = SubgraphRunner(flow, [state.result, recurrent.value], probed=sources, given=[start])
        if whole.masks or runner.masks:
            return False
        chunks = chunk_lengths(flow, state)
        for scale in _SCALES:
            try:
                scan = _Scan(runner=runner, state=state, recurrent=recurrent, scale=scale)
                return _holds(scan, whole, chunks, lengths)
            except FloatingPointError:  # decays that overflow
                continue
    except Exception:  # whatever onnxruntime raises
        return False
    return False


def chunk_lengths(flow: TokenFlow, state: SequenceState) -> set[int]:
    """Return the numbers of tokens that a chunk may have: sizes of the region are divided by them."""
    return {int(divisor) for divisor in _divisors(flow, state.nodes)}


def _divisors(flow: TokenFlow, nodes: Sequence[ir.Node]) -> set[sympy.Expr]:
    sizes = [size for node in nodes for value in node.outputs for size in flow.shapes[value].shape or ()]
    floors = {floor for size in sizes if isinstance(size, sympy.Expr) for floor in size.atoms(sympy.floor)}
    return {sympy.fraction(sympy.together(floor.args[0]))[1] for floor in floors}


def _holds(scan: _Scan, whole: SubgraphRunner, chunks: Collection[int], beyond: Collection[int]) -> bool:
    """Return whether the region is a linear recurrence in texts around its chunks and beyond other numbers."""
    around = {length for chunk in chunks for length in (chunk - 1, chunk, chunk + 1, 2 * chunk + 3, 3 * chunk)}
    lengths = sorted({length for length in {*around, *beyond, 5} if length > 1})
    for length in lengths:
        tokens, zeros, other = np.arange(length), 0 * scan.random_state(0), scan.random_state(length)
        array = whole.run(length, tokens=tokens, scale=scan.scale)[0]
        original = sequence_last(array, scan.state.axes, Rows.of_text(length))
        at_zero, expected = scan.run(tokens, zeros), scan.run(tokens, other)
        if not _is_near(original, at_zero[0]) or not _is_linear(at_zero, expected, scan.run(tokens, 3 * other)):
            return False
        if length == lengths[0] and not _is_visible(at_zero[0], expected[0]):
            return False
        if not all(_joins_up(scan, expected, tokens, other, cut) for cut in _cuts(length, chunks)):
            return False
    return _keeps_sequences_apart(scan, max(lengths))


def _cuts(length: int, chunks: Collection[int]) -> list[int]:
    """Return where a text is cut: after its first token, before its last, and around the end of a chunk."""
    ends = (chunk + offset for chunk in chunks for offset in (-1, 0, 1))
    return sorted({cut for cut in (1, length - 1, *ends) if 0 < cut < length})


def _joins_up(scan: _Scan, expected: _Found, tokens: np.ndarray, before: np.ndarray, cut: int) -> bool:
    """Return whether two pieces of a text, the second from the state after the first, give what the whole gives."""
    first, between = scan.run(tokens[:cut], before)
    second, last = scan.run(tokens[cut:], between)
    return _is_near(expected[0], np.concatenate([first, second], -1)) and _is_near(expected[1], last)


def _is_linear(at_zero: _Found, at_one: _Found, at_three: _Found) -> bool:
    """Return whether result and state after are linear in the state before, of which these are 0, 1 and 3 times."""
    pairs = zip(at_zero, at_one, at_three, strict=True)
    return all(_is_near(zero + 3 * (one - zero), three) for zero, one, three in pairs)


def _is_visible(at_zero: np.ndarray, at_one: np.ndarray) -> bool:
    """Return whether the result depends on the state before, so that a wrong state would show."""
    return bool(np.abs(at_one - at_zero).max() > _VISIBLE * np.ptp(at_zero))


def _keeps_sequences_apart(scan: _Scan, length: int) -> bool:
    """Return whether a sequence of a batch gives the same next to another one, with another state."""
    tokens, before = np.arange(length), scan.random_state(1)
    others = before.copy()
    others[1] *= -2
    pairs = zip(scan.run(tokens, before), scan.run(tokens, others, tokens + length), strict=True)
    return all(_is_near(one[: len(one) // 2], other[: len(one) // 2]) for one, other in pairs)


def _is_near(expected: np.ndarray, found: np.ndarray) -> bool:
    """Return whether arrays are equal up to sums in another order, each row of the last axis by its own numbers."""
    if expected.shape != found.shape:
        return False
    axes = tuple(range(expected.ndim - 1))
    gap, size = np.abs(expected - found).max(axes), np.abs(expected).max(axes)
    return bool((gap <= _CLOSE * size + 1e-7).all())
