"""Cache inputs and the cache outputs that belong to them, found by what the graph computes, never by names.

A cache output is a cache input with new rows appended along the sequence axis, these rows alone, the last of all
rows, or a buffer into which they are written. The graph writes that as a `Concat`, as a scatter, or leaves it to an
operator that declares a past and a present.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import onnx_ir as ir

from kvsurgeon.cache.written_rows import WrittenRows
from kvsurgeon.dataflow.input_dimensions import required_inputs
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.graph.query import STANDARD_DOMAINS, chain, is_operator, producer_of, through
from kvsurgeon.ops.gather import FAR
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.resizing.windows import Window
from kvsurgeon.symbolic.fact import axis_of

# Content of a cache output: past and new rows, the updated buffer, or new rows only.
CacheMode = Literal["dynamic", "static", "new-tokens"]
UpdateMode = CacheMode | Literal["last-rows", "recurrent"]  # the latter two of states of a fixed size


# Metadata of an input that holds the last rows alone, and may have none: their number, after "4+" for 4 first rows.
LAST_ROWS = "kvsurgeon.last_rows"
WINDOW_BUFFER = "sliding_window_cache"  # attribute of GroupQueryAttention: whether it drops rows of its buffers


@dataclass(frozen=True, kw_only=True)
class CacheOperands:
    """Inputs and outputs through which an operator updates a cached tensor.

    Attributes:
        past: Index of the input that is the past.
        present: Index of the output that is the present.
        rows: Index of the input with the new rows.
        axis: Sequence axis of past and present; None if an attribute or the rows that are written give it.
        lengths: Indices of the inputs that give the number of past tokens or the rows to write.
        options: Attributes that choose how the past is stored and do not change the result.
    """

    past: int = 0
    present: int = 0
    rows: int = 1
    axis: int | None = None
    lengths: tuple[int, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def is_declared(self) -> bool:
        """Whether the schema of the operator calls these operands past and present."""
        return self.axis is not None


# Sources: the schemas of ONNX `Attention` (opset 23) and of the contrib operators of onnxruntime.
CACHE_OPERATORS: dict[tuple[str, str], tuple[CacheOperands, ...]] = {
    ("", "Concat"): (CacheOperands(),),
    ("", "TensorScatter"): (CacheOperands(lengths=(2,)),),
    ("", "ScatterElements"): (CacheOperands(rows=2, lengths=(1,)),),
    ("", "ScatterND"): (CacheOperands(rows=2, lengths=(1,)),),
    ("", "Attention"): tuple(CacheOperands(past=4 + i, present=1 + i, rows=1 + i, axis=2) for i in (0, 1)),
    ("com.microsoft", "MultiHeadAttention"): tuple(
        CacheOperands(past=6 + i, present=1 + i, rows=1 + i, axis=2) for i in (0, 1)
    ),
    ("com.microsoft", "GroupQueryAttention"): tuple(
        CacheOperands(past=3 + i, present=1 + i, rows=1 + i, axis=2, lengths=(5, 6), options=(WINDOW_BUFFER,))
        for i in (0, 1)
    ),
    ("com.microsoft", "Attention"): (
        CacheOperands(past=4, present=1, rows=0, axis=3, options=("past_present_share_buffer",)),
    ),
}


@dataclass(frozen=True, kw_only=True)
class CachePair:
    """A cache input and the cache output that belongs to it.

    Attributes:
        past: The cache input.
        present: The cache output.
        node: The operator that updates the cached tensor.
        operands: Its operands through which it does so.
        axis: Sequence axis of the past.
        cache_mode: Content of the present.
    """

    past: ir.Value
    present: ir.Value
    node: ir.Node
    operands: CacheOperands
    axis: int
    cache_mode: UpdateMode

    @property
    def is_buffer(self) -> bool:
        """Whether the past is a buffer into which the new rows are written."""
        return self.cache_mode == "static"

    @property
    def has_fixed_rows(self) -> bool:
        """Whether the number of rows of the past may be fixed in a model of any length."""
        return self.is_buffer or self.cache_mode == "last-rows"

    @property
    def window(self) -> Window | None:
        """The rows of the past, if it holds those of a window, as far as the text has them."""
        if self.node.attributes.get_int(WINDOW_BUFFER, 0):
            return Window(last=self.node.attributes.get_int("local_window_size", 0))
        if self.cache_mode != "last-rows" or self.past.shape is None or isinstance(self.past.shape[self.axis], int):
            return None
        *first, last = _declared_rows(self.past)
        return Window(last=last, first=sum(first))

    @property
    def is_state(self) -> bool:
        """Whether the past is a state of a fixed size, such as that of a convolution."""
        return self.cache_mode == "last-rows" and self.window is None

    @property
    def rows(self) -> ir.Value | None:
        """The new rows, before any views."""
        rows = self.node.inputs[self.operands.rows]
        return None if rows is None else through(rows, is_view)

    @property
    def lengths(self) -> tuple[ir.Value, ...]:
        """Values that give the number of past tokens or the rows to write."""
        return tuple(value for index in self.operands.lengths if (value := self.node.inputs[index]) is not None)


def find_cache_pairs(graph: ir.Graph) -> tuple[CachePair, ...]:
    """Return the cache inputs with their outputs, in the order of the graph inputs.

    Raises:
        UnsupportedError: Two outputs return one cache input with different new rows, or its sequence axis is ambiguous.
    """
    order = {value: index for index, value in enumerate(required_inputs(graph))}
    found: dict[ir.Value, CachePair] = {}
    concats, written = _inner_concats(graph, order), cache(lambda: WrittenRows(graph))
    for present in graph.outputs:
        pair = _updated(present, order, written) or _new_rows(present, concats) or _last_rows(present, order, written)
        if pair is None:
            continue
        other = found.get(pair.past)
        if other is not None and other.rows is not pair.rows:
            raise UnsupportedError(
                "two outputs return one cache input with different new rows", at=pair.past.name,
                code=Code.UNKNOWN_CACHE, found=f"`{other.present.name}` and `{present.name}`",
            )  # fmt: skip
        found[pair.past] = pair  # the last of several: outputs that the export had before its cache come first
    return tuple(sorted(found.values(), key=lambda pair: order[pair.past]))


def has_features(value: ir.Value) -> bool:
    """Return whether an input has several features per token, as keys and values have and masks have not."""
    return any(isinstance(size, int) and size > 1 for size in tuple(value.shape or ())[1:])


def _updated(present: ir.Value, inputs: Iterable[ir.Value], written: Callable[[], WrittenRows]) -> CachePair | None:
    """Return the pair of an output that holds past and new rows.

    Raises:
        UnsupportedError: Rows are written elsewhere than after those of the past.
    """
    updated = through(present, is_view)
    node = updated.producer()
    if node is None:
        return None
    for operands in CACHE_OPERATORS.get((node.domain.replace("ai.onnx", ""), node.op_type), ()):
        value = node.inputs[operands.past] if operands.past < len(node.inputs) else None
        if value is None or updated is not node.outputs[min(operands.present, len(node.outputs) - 1)]:
            continue
        past, views = _skip_views(value)
        if past not in inputs or not (operands.is_declared or past.shape):
            continue
        axis = _axis_of_past(views, _updated_axis(node, operands, written), past)
        if operands.is_declared:
            cache_mode = _declared_mode(node, past, present, axis)
        else:
            cache_mode = "static" if has_trait(node, Trait.SCATTER) else "dynamic"
        return CachePair(past=past, present=present, node=node, operands=operands, axis=axis, cache_mode=cache_mode)
    return None


def _last_rows(present: ir.Value, inputs: Iterable[ir.Value], written: Callable[[], WrittenRows]) -> CachePair | None:
    """Return the pair of an output that holds the last rows of past and new ones, as many as the past has.

    The first rows may come before them. The input must be declared as one: a model that keeps the last keys looks the
    same.
    """
    returned = through(present, is_view)
    both = producer_of(returned, "Concat")
    first, last = (None, returned) if both is None or len(both.inputs) != 2 else both.inputs
    node = producer_of(last, "Slice")
    if node is None or node.inputs[0] is None or present.shape is None:
        return None
    pair, (start, end, axis) = _updated(node.inputs[0], inputs, written), map(_number, (*node.inputs[1:4], None)[:3])
    if pair is None or pair.cache_mode != "dynamic" or pair.past.shape is None or axis != pair.axis:
        return None
    declared, rows = _declared_rows(pair.past), pair.past.shape[axis]
    if first is None:
        is_last = start is not None and declared == [-start]
    else:
        node_of_first = first.producer()
        is_last = len(declared) == 2 and node_of_first is not None and node_of_first.inputs[0] is node.inputs[0]
    fits = rows == sum(declared) or not isinstance(rows, int)  # always as many, or fewer in a shorter text
    return replace(pair, present=present, cache_mode="last-rows") if is_last and fits and (end or 0) > FAR else None


def _declared_rows(past: ir.Value) -> list[int]:
    """Return the numbers of first rows, if any, and of last rows that an input is declared to hold."""
    return [int(number) for number in past.metadata_props.get(LAST_ROWS, "").split("+") if number]


def _number(value: ir.Value | None) -> int | None:
    numbers = small_constant(value)
    return int(numbers.item()) if numbers is not None and numbers.size == 1 else None


def _updated_axis(node: ir.Node, operands: CacheOperands, written: Callable[[], WrittenRows]) -> int:
    """Return the axis along which a node updates its first input."""
    if operands.axis is not None:
        return operands.axis
    return written().axis(node) if has_trait(node, Trait.SCATTER) else node.attributes.get_int("axis", 0)


def _declared_mode(node: ir.Node, past: ir.Value, present: ir.Value, axis: int) -> CacheMode:
    """Return static if past and present are declared to have the same number of rows, dynamic otherwise."""
    if node.attributes.get_int(WINDOW_BUFFER, 0):
        return "static"
    sizes = [None if value.shape is None else value.shape[axis] for value in (past, present)]
    is_named = isinstance(sizes[0], int) or getattr(sizes[0], "value", None) is not None
    return "static" if is_named and sizes[0] == sizes[1] else "dynamic"


def _inner_concats(graph: ir.Graph, inputs: Iterable[ir.Value]) -> dict[ir.Value, list[ir.Node]]:
    """Return every `Concat` of an input and something else, by the latter."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        if node.op_type != "Concat" or len(node.inputs) != 2 or None in node.inputs:
            continue
        past, rows = (through(value, is_view) for value in node.inputs if value is not None)
        if past in inputs and len(past.shape or ()) > 2 and (rows not in inputs or has_features(rows)):
            found.setdefault(rows, []).append(node)
    return found


def _new_rows(present: ir.Value, concats: dict[ir.Value, list[ir.Node]]) -> CachePair | None:
    """Return the pair of an output that holds new rows only."""
    nodes = concats.get(through(present, is_view), [])
    if len(nodes) != 1 or nodes[0].inputs[0] is None:
        return None
    past, views = _skip_views(nodes[0].inputs[0])
    (operands,) = CACHE_OPERATORS["", "Concat"]
    axis = _axis_of_past(views, nodes[0].attributes["axis"].as_int(), past)
    return CachePair(
        past=past, present=present, node=nodes[0], operands=operands, axis=axis, cache_mode="new-tokens"
    )  # fmt: skip


def _skip_views(value: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
    """Return the value before any views, and the view operators, the last one first."""
    *views, source = chain(value, lambda node: node.inputs[0] if is_view(node) else None)
    return source, [node for view in views if (node := view.producer()) is not None]


def is_view(node: ir.Node) -> bool:
    """Return whether a node gives the elements of its first input another shape or order."""
    if node.domain not in STANDARD_DOMAINS or not node.inputs:
        return False
    is_single = node.op_type == "Concat" and len(node.inputs) == 1
    return is_single or has_trait(node, Trait.IDENTITY, Trait.TRANSPOSE, Trait.RESHAPE)


def _axis_of_past(views: list[ir.Node], axis: int, past: ir.Value) -> int:
    """Return the axis of the past that the views map to an axis.

    Raises:
        UnsupportedError: The shape of the past is unknown, or the axis is ambiguous.
    """
    if past.shape is None:
        raise UnsupportedError(
            "a cache input has no declared shape", code=Code.UNKNOWN_CACHE, at=past.name, expected="a shape"
        )
    rank = len(past.shape)
    ranks = [rank := rank + _axes_added(view) for view in reversed(views)]
    axis = axis_of(axis, ranks[-1] if ranks else rank)
    for view, after in zip(views, reversed(ranks), strict=True):
        before = _axis_before(view, axis, after)
        if before is None:
            return _only_dynamic_axis(past)
        axis = before
    return axis


def _axes_added(view: ir.Node) -> int:
    """Return how many axes a view adds, negative if it removes axes; 0 if that is unknown."""
    count = len(_axes_of(view) or ())
    return count if is_operator(view, "Unsqueeze") else -count if is_operator(view, "Squeeze") else 0


def _axes_of(view: ir.Node) -> list[int] | None:
    """Return the axes that a `Squeeze` or `Unsqueeze` removes or adds, if they are known and count from the front."""
    given = view.attributes.get_ints("axes")
    numbers = small_constant(view.inputs[1]) if given is None and len(view.inputs) > 1 else given
    axes = None if numbers is None else [int(axis) for axis in numbers]
    return None if axes is None or min(axes) < 0 else axes


def _axis_before(view: ir.Node, axis: int, rank: int) -> int | None:
    """Return the axis of the input of a view that is an axis of its output; None if that is unknown."""
    if view.op_type == "Transpose":
        order = view.attributes.get_ints("perm")
        return rank - 1 - axis if order is None else order[axis]
    if not has_trait(view, Trait.RESHAPE):
        return axis
    axes = _axes_of(view) if _axes_added(view) else None
    if axes is None:
        return None
    if view.op_type == "Unsqueeze":
        return None if axis in axes else axis - sum(one < axis for one in axes)
    for one in sorted(axes):
        axis += one <= axis
    return axis


def _only_dynamic_axis(past: ir.Value) -> int:
    """Return the dynamic axis after the batch axis.

    Raises:
        UnsupportedError: There are several, or none.
    """
    dynamic = [index for index, size in enumerate(past.shape or ()) if index and not isinstance(size, int)]
    if len(dynamic) != 1:
        raise UnsupportedError(
            "the cache input is reshaped before it is updated, so its sequence axis is ambiguous",
            code=Code.UNKNOWN_CACHE, at=past.name, expected="one dynamic axis after the batch axis",
            found=str(past.shape),
        )  # fmt: skip
    return dynamic[0]
