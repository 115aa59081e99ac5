"""Windows: the rows that the cache of a layer keeps, and attention that reads no others.

A window of the last rows may come after the first tokens of the text, which all queries attend to. First tokens are
those that the mask of a sequence marks, so padding is none of them. Rows that are dropped lie between those that are
kept. Kept rows stay in order, and distances within the window are what they were.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.dataflow.input_roles import padding_mask
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor, NodeBuilder
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import axis_links, has_trait
from kvsurgeon.resizing.lengths import INT64, LengthValues, sources_of
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Extent
from kvsurgeon.symbolic.sequence_axes import Length


@dataclass(frozen=True, kw_only=True)
class Window:
    """The rows that the cache of a layer keeps.

    Attributes:
        last: Number of last rows.
        first: Number of first tokens, whose rows are kept too.
    """

    last: int
    first: int = 0

    def __str__(self) -> str:
        return f"{self.first}+{self.last}" if self.first else str(self.last)

    @property
    def most(self) -> int:
        """Most rows that are kept."""
        return self.first + self.last

    @property
    def extent(self) -> Extent:
        """Number of rows that there are in a text."""
        first = f"first_{self.first}_" if self.first else ""
        return dim.extent(f"{first}last_{self.last}_rows")


Windows = Mapping[int, Window]  # by the index of the attention site
NO_WINDOWS: Windows = MappingProxyType({})


def union(windows: Sequence[Window | None]) -> Window | None:
    """Return the window with all rows that some windows have; None if one of them is None: all rows."""
    found = [window for window in windows if window is not None]
    if not found or len(found) < len(windows):
        return None
    return Window(last=max(one.last for one in found), first=max(one.first for one in found))


def kept_rows(
    op: NodeBuilder, window: Window, rows: ir.Value, axis: int, dropped: ir.Value, first: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """Return the rows of the first tokens, and all after them but those that are dropped.

    Args:
        op: Adds the nodes.
        window: The window.
        rows: All rows.
        axis: Their axis.
        dropped: Number of rows that are dropped, int64 [1].
        first: Indices of the first tokens, in the shape of their rows; None for 0, 1, ....
    """
    axes = op.int64([axis])
    if first is None:
        start = op.Slice(rows, op.int64([0]), op.int64([window.first]), axes)
    else:
        start = op.GatherElements(rows, first, axis=axis)
    after = op.Add(dropped, op.int64([window.first]))
    return start, op.Slice(rows, after, op.int64([int(INT64.max)]), axes)


def first_tokens(op: NodeBuilder, window: Window, mask: ir.Value, dropped: ir.Value, count: ir.Value) -> ir.Value:
    """Return the indices of the first tokens, [batch, most first rows], for `kept_rows`.

    If the first tokens are not yet as far from the end as a window, all rows between them and the end are kept.

    Args:
        op: Adds the nodes.
        window: The window.
        mask: Marks the tokens, [batch, columns].
        dropped: Number of rows that are dropped, int64 [1].
        count: Number of rows before any are dropped, or at least that of those that are kept, int64 [1].
    """
    numbers = op.Slice(op.constant(np.arange(window.first)), op.int64([0]), count)
    before = op.LessOrEqual(
        op.with_axes("Unsqueeze", _token_numbers(op, mask), [1]), op.with_axes("Unsqueeze", numbers, [1])
    )
    return op.Min(op.with_axes("ReduceSum", op.Cast(before, to=INT64), [2], keepdims=0), op.Add(numbers, dropped))


def kept_columns(lengths: LengthValues, window: Window, mask: ir.Value) -> ir.Value:
    """Return the columns of a mask of all tokens so far for the rows that a window keeps, and for the new tokens."""

    def make() -> ir.Value:
        op = NodeBuilder(lengths.editor, f"{mask.name}.kept")
        columns, total = op.Slice(op.Shape(mask), op.int64([1]), op.int64([2])), lengths.flat(lengths.total)
        dropped = op.Sub(columns, total)
        first = first_tokens(op, window, mask, dropped, total)
        return op.Concat(*kept_rows(op, window, mask, 1, dropped, first), axis=1)

    return lengths.once(("kept columns", mask), make)


def limit_attention(analysis: Analysis, windows: Windows) -> int:
    """Hide all keys but those in a window from the queries of some layers, and return the number of edits.

    Args:
        analysis: Analysis of a model without a cache; its graph is changed.
        windows: The windows by the index of the attention site.

    Raises:
        UnsupportedError: The weights of a layer are no softmax along its keys, or the inputs do not mark padding; the
            graph is unchanged.
    """
    masks = [given for given in analysis.inputs if given.lengths and not given.is_token]
    mask = padding_mask(analysis.inputs)
    if masks and mask is None:
        raise UnsupportedError(
            "the first tokens of a text are not known", code=Code.INPUT_ROLE, at=masks[0].value.name,
            expected="one mask [batch, total_sequence], 1 at tokens and 0 at padding", found=str(masks[0].value.shape),
        )  # fmt: skip
    scores = {index: _scores(analysis, analysis.sites[index], has_mask=mask is not None) for index in windows}
    editor = Editor(analysis.model)
    sources = sources_of({given.value: given.dimensions for given in analysis.inputs if given.is_token})
    lengths = LengthValues(editor, sources, total=analysis.length, past=0)
    for index, (softmax, order) in scores.items():
        visible = _visible(lengths, windows[index], mask)
        _hide(analysis, editor, softmax, order, visible)
    editor.finish()
    return editor.edits


def _scores(analysis: Analysis, site: AttentionSite, *, has_mask: bool) -> tuple[ir.Node, tuple[int, int]]:
    """Return the softmax of an attention, and the axes of the queries and of the keys of what it reads.

    Raises:
        UnsupportedError: There is none, or several.
    """
    flow = analysis.flow
    found = [node for node in site.upstream_of_weights if has_trait(node, Trait.SOFTMAX)]
    value = found[0].inputs[0] if len(found) == 1 and site.fused is None else None
    axes = () if value is None else flow.axes.get(value, ())
    places = {axis.variable.resolved(): axis.axis for axis in axes if axis.is_plain}
    shape = (() if value is None else flow.shapes[value].shape) or ()
    is_by_batch = bool(shape) and shape[0] == flow.batch and 0 not in places.values()
    if len(axes) != 2 or set(places) != set(Length) or (has_mask and not is_by_batch):
        raise _not_limited(site, str(list(shape)))
    links = axis_links(flow.shapes.call(found[0]))
    assert links is not None
    summed = [axis for axis, label in enumerate(links.outputs[0]) if label in links.mixed]
    if summed != [places[Length.TOTAL]]:
        raise _not_limited(site, f"a softmax along axes {summed}")
    return found[0], (places[Length.NEW], places[Length.TOTAL])


def _not_limited(site: AttentionSite, found: str) -> UnsupportedError:
    return UnsupportedError(
        "attention cannot be limited to a window", code=Code.PASS_PRECONDITION, at=site.at.name,
        expected="one softmax along the keys of scores [batch, ..., queries, keys]", found=found,
    )  # fmt: skip


def _visible(lengths: LengthValues, window: Window, mask: ir.Value | None) -> ir.Value:
    """Return whether a query attends to a key, [batch or 1, queries, keys]."""

    def make() -> ir.Value:
        op = NodeBuilder(lengths.editor, "window")
        numbers = op.Range(lengths.scalar(0), lengths.scalar(lengths.total), lengths.scalar(1))
        queries, keys = op.with_axes("Unsqueeze", numbers, [0, 2]), op.with_axes("Unsqueeze", numbers, [0, 1])
        near = op.Less(op.Sub(queries, keys), op.int64(window.last))
        if mask is not None:
            keys = op.Sub(op.with_axes("Unsqueeze", _token_numbers(op, mask), [1]), op.int64(1))
        return op.Or(near, op.Less(keys, op.int64(window.first)))

    return lengths.once(("visible", window), make)


def _token_numbers(op: NodeBuilder, mask: ir.Value) -> ir.Value:
    """Return the number of tokens that a mask marks up to each column."""
    return op.CumSum(op.Cast(mask, to=INT64), op.int64(1))


def _hide(analysis: Analysis, editor: Editor, softmax: ir.Node, axes: tuple[int, int], visible: ir.Value) -> None:
    scores = softmax.inputs[0]
    assert scores is not None
    fact = analysis.flow.shapes[scores]
    assert fact.shape is not None
    assert fact.dtype is not None
    op, (query, key) = NodeBuilder(editor, f"{scores.name}.window", like=softmax), axes
    if key < query:
        visible = op.Transpose(visible, perm=[0, 2, 1])
    if query and key:
        others = [axis for axis in range(1, len(fact.shape)) if axis not in axes]
        visible = op.with_axes("Unsqueeze", visible, others) if others else visible
    else:
        visible = op.with_axes("Squeeze", visible, [0])
    hidden = op.number(-np.inf, fact.dtype)
    editor.replace_input(softmax, 0, op.Where(visible, scores, hidden))
