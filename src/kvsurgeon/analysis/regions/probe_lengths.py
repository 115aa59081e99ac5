"""Probe lengths: lengths of texts beyond every number with which a region may compare positions or counts of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.probe_inputs import at_length
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.ops.gather import FAR
from kvsurgeon.ops.operator import AxisLinks, Trait, UntraceableAxesError
from kvsurgeon.ops.table import axis_links, has_trait
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import OperatorCall

MAX_PROBE_LENGTH = 4100  # tokens: a number of at most this many is a length that a text may have
MAX_ELEMENTS = 1 << 26  # of a tensor that is computed in a run


def lengths_beyond(flow: TokenFlow, nodes: Iterable[ir.Node]) -> list[int] | None:
    """Return a length beyond each number that the nodes compare positions with, and beyond their sum.

    Returns:
        The lengths in rising order; None if one of them is longer than texts that can be run.
    """
    nodes, counts = list(nodes), set[int]()
    for node in nodes:
        counts |= {abs(number) for number in _numbers(flow, node) if 1 < abs(number) < FAR}
    total = min(sum(counts), MAX_PROBE_LENGTH)
    largest = max((_elements(flow, node, total + 2) for node in nodes), default=0)
    if max(counts, default=0) > MAX_PROBE_LENGTH or largest > MAX_ELEMENTS:
        return None
    return sorted({count + 2 for count in (*counts, total)})


def _elements(flow: TokenFlow, node: ir.Node, length: int) -> int:
    """Return the number of elements of a node's output at a length; unknown dimensions count as 1."""
    sizes = (at_length(size, length) for size in flow.shapes[node.outputs[0]].shape or ())
    return math.prod(size for size in sizes if isinstance(size, int))


def _numbers(flow: TokenFlow, node: ir.Node) -> Iterator[int]:
    """Yield the numbers of a node that may be a distance, a position or a count of tokens."""
    call = flow.shapes.call(node)
    if has_trait(node, Trait.ADD, Trait.LENGTH_SENSITIVE, Trait.ORDER, Trait.BOUND):
        yield from (number for value in node.inputs for number in _as_lengths(small_constant(value)))
    try:
        links = axis_links(call)
    except UntraceableAxesError:
        links = None
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
    if constant is None or constant.size != 1 or constant.dtype.kind not in "iuf":
        return
    number = float(constant.reshape(-1)[0])
    if constant.dtype.kind != "f":
        yield int(number)
        return
    for length in (abs(number), 1 / abs(number)) if number else ():
        if length <= MAX_PROBE_LENGTH:
            yield round(length)
