"""Probe lengths: the lengths of texts, and the positions in them, at which a region or context may change.

They are beyond every number with which a region compares positions or counts of tokens, and where context that it reads
changes: a threshold need not be a number that something is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.probe_inputs import Rows
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.thresholds import FLOAT_KINDS, SCANNED, changes, lengths_of_change, longest_running, numbers_of
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.graph.query import producers, upstream
from kvsurgeon.ops.gather import FAR
from kvsurgeon.ops.operator import AxisLinks, Trait
from kvsurgeon.ops.table import find_links, has_trait
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import OperatorCall

MAX_PROBE_LENGTH = 4100  # tokens: a number of at most this many is a length that a text may have
MAX_ELEMENTS = 1 << 26  # of a tensor that is computed in a run
_FOLLOWED = 9  # tokens from a number on, so that one beyond it is followed by others, masked ones among them


def lengths_beyond(flow: TokenFlow, result: ir.Value, sources: Sequence[ir.Value]) -> list[int] | None:
    """Return lengths at which what is computed between sources and result may change.

    They are each number that positions are compared with, a length beyond it, the same of the sum of all, and the
    lengths at which a factor or a condition that depends on the length alone changes.

    Returns:
        The lengths in rising order; None if one of them is longer than texts that can be run.
    """
    nodes, counts = producers(upstream([result], stop=sources.__contains__)), set[int]()
    for node in nodes:
        counts |= {abs(number) for number in _numbers(flow, node) if 1 < abs(number) < FAR}
    total = min(sum(counts), MAX_PROBE_LENGTH)
    shapes = [flow.shapes[node.outputs[0]].shape or () for node in nodes]
    largest = max((elements_at(shape, total + _FOLLOWED) for shape in shapes), default=0)
    if max(counts, default=0) > MAX_PROBE_LENGTH or largest > MAX_ELEMENTS:
        return None
    near = {length for count in (*counts, total) for length in (count, count + _FOLLOWED)}
    return sorted({length for length in near | _switching_lengths(flow, nodes) if length})


def _switching_lengths(flow: TokenFlow, nodes: Iterable[ir.Node]) -> set[int]:
    """Return the lengths at which floats and conditions that nodes read change, if they have no axis of tokens."""
    lengths = set[int]()
    for value in {value for node in nodes for value in node.inputs if value is not None}:
        if flow.kinds.get(value) is not ValueKind.CONTEXT:
            continue
        fact = flow.shapes[value]
        if fact.value is None and fact.dtype is not None and not fact.dtype.is_integer() and _is_static(fact.shape):
            lengths |= _changes(flow, value)
    return lengths


def _is_static(shape: Sequence[Dimension] | None) -> bool:
    return shape is not None and all(isinstance(size, int) for size in shape)


def _changes(flow: TokenFlow, value: ir.Value) -> set[int]:
    """Return the lengths at either side of which a value begins or ceases to change; it is run at each length once."""
    if value not in flow.changes:
        runner = SubgraphRunner(flow, [value])
        longest = longest_running(runner.run, SCANNED)
        flow.changes[value] = lengths_of_change([runner.run(length)[0] for length in range(1, longest + 1)])
    return flow.changes[value]


def elements_at(shape: Sequence[Dimension], length: int) -> int:
    """Return the number of elements of a tensor at a length; unknown dimensions count as 1."""
    return math.prod(Rows.of_text(length).sizes(shape))


def _numbers(flow: TokenFlow, node: ir.Node) -> Iterator[int]:
    """Yield the numbers of a node that may be a distance, a position or a count of tokens."""
    call = flow.shapes.call(node)
    if has_trait(node, Trait.ADD, Trait.LENGTH_SENSITIVE, Trait.ORDER, Trait.BOUND):
        yield from (number for value in node.inputs for number in _as_lengths(small_constant(value)))
    links = find_links(call)
    if links is not None:
        yield from _along_tokens(call, links)


def _along_tokens(call: OperatorCall, links: AxisLinks) -> Iterator[int]:
    """Yield the numbers that links state of axes whose size is not fixed."""
    if links.diagonal is not None:
        yield from _integers(call.numbers(1))
    for label, size in zip(links.inputs[0] or (), call.fact(0).shape or (), strict=False):
        if isinstance(size, int) or label is None:
            continue
        yield from _integers((*links.windows.get(label, ()), *links.padded.get(label, ())))
        yield from _integers(links.selected.get(label, ())[:2])
        if label in links.mixed or label not in links.outputs[0]:  # indices, or how many elements are kept
            yield from _integers(call.numbers(1))


def _integers(numbers: Iterable[Dimension | float] | None) -> Iterator[int]:
    return (number for number in numbers or () if isinstance(number, int))


def _as_lengths(constant: np.ndarray | None) -> Iterator[int]:
    """Yield a number, or the lengths whose reciprocal it is; one of a float type only if a text can be as long."""
    if constant is not None and constant.size == 1:
        longest = MAX_PROBE_LENGTH if constant.dtype.kind in FLOAT_KINDS else math.inf
        yield from (round(number) for number in numbers_of(constant) if abs(number) <= longest)


def changing_context(flow: TokenFlow, nodes: Iterable[ir.Node]) -> tuple[set[int], set[int]]:
    """Return positions, and total lengths, at which context that the nodes read differs from the one before."""
    read = {value for node in nodes for value in node.inputs if value is not None}
    positions, lengths = set[int](), set[int]()
    for value in read:
        shape = flow.shapes[value].shape
        if flow.kinds.get(value) is not ValueKind.CONTEXT or flow.shapes[value].value is not None or shape is None:
            continue
        axes = [axis for axis, size in enumerate(shape) if size is flow.length]
        if len(axes) > 1 or elements_at(shape, SCANNED) > MAX_ELEMENTS:
            continue
        if axes:
            runner = SubgraphRunner(flow, [value])
            longest = longest_running(runner.run, SCANNED)
            array = np.moveaxis(runner.run(longest)[0], axes[0], 0).reshape(longest, -1).astype(np.float64)
            differs = (np.diff(array, 2, axis=0) != 0).max(axis=1)
            positions |= {place + offset for place in changes(differs) for offset in (1, 2)}
        else:
            lengths |= _changes(flow, value)
    return positions, lengths
