"""Where a graph is told how many tokens are past, when the rows of a past do not tell it.

In a first call there are none: a buffer is written from its first row on, and a past of no rows has none that are
filled. So the number that says where rows are written, or that is reckoned with together with the rows of a past of
which not all need be filled, is 0 then, whatever it is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from kvsurgeon.cache.layout import declared, names_of
from kvsurgeon.cache.pairs import CachePair
from kvsurgeon.dataflow.input_roles import read_inputs, real_inputs
from kvsurgeon.dataflow.shape_inference import Shapes, infer_shapes
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.operators import SHAPE_ONLY
from kvsurgeon.symbolic.dimension import LENGTH

Count = Literal["shape", "input", "positions", "mask"]

_VIEWS = frozenset({"Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze"})
_PICKS = _VIEWS | {"Gather", "Slice"}  # of which each element is an element of the first input
_SUMS = frozenset({"Add", "Sub"})


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Where the number of past tokens is read.

    Attributes:
        count: The shape of the past, an input of its own, the first of the positions, or the length of the mask.
        name: Of the input of its own.
        dtype: Its type.
        shape: Its dimensions.
    """

    count: Count = "shape"
    name: str = ""
    dtype: ir.DataType = ir.DataType.INT64
    shape: tuple[int | str | None, ...] = (1,)


@dataclass(frozen=True, kw_only=True)
class Counter:
    """A number of past tokens in a graph."""

    value: ir.Value  # the number
    source: ir.Value  # the input that it is, or is an element of
    shape: tuple[int, ...]  # that a number has in its place

    @property
    def is_input(self) -> bool:
        """Whether the input holds nothing else."""
        return self.value is self.source


def tally_of(counters: Sequence[Counter], joins: Sequence[CachePair]) -> Tally | None:
    """Return where a cache reads the number of past tokens; None where several inputs tell it."""
    if not counters:
        return Tally(count="mask" if any(join.is_written for join in joins) else "shape")
    if len(counters) > 1 or any(join.cache_mode == "dynamic" for join in joins):
        return None
    source = counters[0].source
    if not counters[0].is_input:
        return Tally(count="positions")
    assert source.dtype is not None
    return Tally(count="input", name=source.name or "", dtype=source.dtype, shape=declared(source))


def find_counters(graph: ir.Graph, joins: Sequence[CachePair]) -> list[Counter]:
    """Return the numbers that are 0 in a first call, because they count past tokens.

    Raises:
        UnsupportedError: Rows are written at a place that is told by something that says more than such a number.
    """
    if not any(join.is_written or join.cache_mode == "new-tokens" for join in joins):
        return []
    dimensions, _ = read_inputs(graph)
    of_tokens = {
        name
        for value, sizes in dimensions.items()
        for name, size in zip(names_of(value), sizes, strict=True)
        if size is LENGTH and len(sizes) > 1
    }
    trace = _Trace(infer_shapes(graph, dimensions, graph.opset_imports.get("", 1)), frozenset(of_tokens))
    found: dict[ir.Value, Counter] = {}
    for value in _met_by_rows(graph, [join.past for join in joins if join.cache_mode == "new-tokens"]):
        for counter in trace.counters(value):
            found[counter.value] = counter
    for join in joins:
        for written in join.counts if join.is_written else ():
            counters = trace.counters(written, all_of_them=join.slot is None)
            if join.slot is None:
                _check_start(written, {counter.value for counter in counters})
            else:  # an operator that keeps its past itself may read off a mask how much of it there is
                counters = [counter for counter in counters if counter.is_input]
            found |= {counter.value: counter for counter in counters}
    return list(found.values())


def count_none(graph: ir.Graph, editor: Editor, counter: Counter) -> None:
    """Let whoever read the number of past tokens read 0, once or for each text."""
    assert counter.source.dtype is not None
    dtype = counter.value.dtype or counter.source.dtype
    none = editor.constant(np.zeros(counter.shape), dtype.numpy(), name="no_past")
    batch = next(iter(names_of(counter.source)), None) if counter.is_input else None
    given = next((value for value in real_inputs(graph) if batch is not None and batch in names_of(value)), None)
    if given is not None:
        sizes = editor.node("Shape", [given], name="sizes", dtype=ir.DataType.INT64)
        place = editor.constant([names_of(given).index(batch)], name="axis")
        texts = editor.node("Gather", [sizes, place], {"axis": 0}, name="texts", dtype=ir.DataType.INT64)
        none = editor.node("Expand", [none, texts], name="no_past_of_texts", dtype=none.dtype)
    counter.value.replace_all_uses_with(none)


@dataclass(frozen=True)
class _Trace:
    """Follows numbers back to the inputs that tell them."""

    shapes: Shapes
    of_tokens: frozenset[str | None]  # names of dimensions that are as long as a call has tokens

    def counters(self, value: ir.Value, *, all_of_them: bool = False) -> list[Counter]:
        """The numbers of past tokens that a value is made of.

        Raises:
            UnsupportedError: It is made of an input that tells something else, and all that it is made of are asked
                for.
        """
        found: dict[ir.Value, Counter] = {}
        seen: set[ir.Value] = set()
        pending: list[tuple[ir.Value, ir.Value | None]] = [(value, None)]  # with the element that is made of it
        while pending:
            current, element = pending.pop()
            if current in seen:
                continue
            seen.add(current)
            if self._is_number(current):
                element = current
            node = current.producer()
            if node is not None and node.op_type not in SHAPE_ONLY:
                element = element if node.op_type in _PICKS else None
                pending += [(source, element) for source in node.inputs if source is not None]
            elif node is None and current.is_graph_input() and not current.is_initializer():
                counter = self._counter(current, element)
                if counter is not None:
                    found[counter.value] = counter
                elif all_of_them:
                    raise UnsupportedError(
                        "where rows are written is told by an input that says more than a number", at=current.name,
                        expected="the number of past tokens", found=str(current.shape),
                    )  # fmt: skip
        return list(found.values())

    def _counter(self, source: ir.Value, element: ir.Value | None) -> Counter | None:
        if source.dtype is None or not source.dtype.is_integer():
            return None
        names = names_of(source)
        if len(names) < 2 and not (set(names) - {None}) & self.of_tokens:  # a number, or one for each row of a batch
            return Counter(value=source, source=source, shape=(1,) * len(names))
        if element is None:
            return None
        return Counter(value=element, source=source, shape=(1,) * len(self.shapes[element].shape or ()))

    def _is_number(self, value: ir.Value) -> bool:
        shape = self.shapes[value].shape
        return shape is not None and all(size == 1 for size in shape)


def _met_by_rows(graph: ir.Graph, pasts: Sequence[ir.Value]) -> Iterator[ir.Value]:
    """What is added to the number of rows of a past, or taken from it."""
    rows: set[ir.Value] = set()
    for node in graph:
        met = [value for value in node.inputs if value is not None and value not in rows]
        if node.op_type in SHAPE_ONLY:
            if not set(node.inputs) & set(pasts):
                continue
        elif len(met) == len(node.inputs):
            continue
        if node.op_type in _SUMS:
            yield from met
        rows.update(node.outputs)


def _check_start(written: ir.Value, counters: set[ir.Value]) -> None:
    """Hold that rows are written from the number of past tokens on, and so from the first row in a first call.

    Raises:
        UnsupportedError: They may not be.
    """
    if counters and not _starts_at(written, counters):
        raise UnsupportedError(
            "rows are not surely written behind those of the past", at=written.name,
            expected="places that count up from the number of past tokens",
            found=f"a number made of `{next(iter(counters)).name}`",
        )  # fmt: skip


def _starts_at(value: ir.Value | None, counters: set[ir.Value]) -> bool:
    """Whether numbers count up from one of the counters, or are it."""
    while value is not None and value not in counters:
        node = value.producer()
        if node is None:
            return False
        if node.op_type == "Add":
            one, other = node.inputs
            return (_starts_at(one, counters) and _starts_at_nought(other)) or (
                _starts_at(other, counters) and _starts_at_nought(one)
            )
        if node.op_type != "Range" and node.op_type not in _VIEWS:
            return False
        value = node.inputs[0]
    return value is not None


def _starts_at_nought(value: ir.Value | None) -> bool:
    """Whether numbers count up from 0, or are 0."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type != "Range" and node.op_type not in _VIEWS:
            return False
        value = node.inputs[0]
    numbers = small_constant(value)
    return numbers is not None and numbers.size > 0 and numbers.reshape(-1)[0] == 0
