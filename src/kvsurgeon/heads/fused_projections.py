"""Fused projections: one product that computes several of queries, keys and values, in any column order.

An index trace shows which columns make which heads. The columns of the new product are `[others | keys | values]`,
slice by slice; a `Split` and a reshape of each slice replace the nodes that separated them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.token_data import token_inputs
from kvsurgeon.analysis.token_flow import Place
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import find_live, upstream
from kvsurgeon.heads.head_axis import HeadAxis
from kvsurgeon.heads.index_trace import IndexTrace
from kvsurgeon.heads.layout import Layout, head_axis, layout_of, named_dims, with_heads
from kvsurgeon.heads.layout_builder import LayoutBuilder
from kvsurgeon.heads.propagate import HeadPropagation, HeadRequest
from kvsurgeon.heads.selection import Selection, Term, Terms

# Columns of a fused projection, the layout in which they are read, and a function that connects their readers.
ProjectionSlice = tuple[Terms, Layout, Callable[[ir.Value], None]]


def rebuild_projections(propagation: HeadPropagation, layouts: LayoutBuilder, unused: Collection[ir.Value]) -> None:
    """Rebuild fused projections until no request is left, without the columns of values that are `unused`.

    Raises:
        UnsupportedError: The columns of a request cannot be traced.
    """
    trace, order = propagation.trace, propagation.flow.order
    shrunk = {trace.source(value) for value in unused}
    requests: dict[ir.Value, list[HeadRequest]] = {}
    done = 0
    while len(propagation.requests) > done or requests or shrunk:
        for request in propagation.requests[done:]:
            source = trace.source(request.values[0])
            if source is request.values[0]:
                raise _untraceable(source)
            requests.setdefault(source, []).append(request)
        done = len(propagation.requests)
        producers = {value: value.producer() for value in (*requests, *shrunk)}
        last = max(producers, key=lambda value: -1 if (node := producers[value]) is None else order[node])
        shrunk.discard(last)
        _rebuild(propagation, layouts, last, requests.pop(last, []), unused)


def _rebuild(
    propagation: HeadPropagation, layouts: LayoutBuilder, source: ir.Value, requests: list[HeadRequest],
    unused: Collection[ir.Value],
) -> None:  # fmt: skip
    trace, editor = propagation.trace, propagation.editor
    layout = layout_of(trace.flow, source)
    wanted = {request.values[0] for request in requests} | set(unused)
    others = list(_other_slices(trace, editor, source, wanted))
    if not others and len(requests) == 1 and _is_whole(trace, source, requests[0].values[0]):
        _rebuild_single(propagation, layouts, source, requests[0])
        return
    axis = _column_axis(layout, source)
    slices = [*others, *(_requested_slice(trace, source, request) for request in requests)]
    longest = max((request.values for request in requests), key=len, default=())
    sources = (source, *(trace.source(value) for value in longest[1:]))  # of layers that are averaged
    columns = Selection(layout.width, tuple(terms for terms, _, _ in slices))
    new = propagation.propagated(sources, HeadAxis(axis, layout.width), columns)
    parts = editor.split(new, [one.width for _, one, _ in slices], axis, name=f"{source.name}.pieces")
    tokens = [layout.parts[place] for place in layout.token_places]
    for (_, read, connect), part in zip(slices, parts, strict=True):
        shape = (*layout.shape[:axis], read.width)
        connect(layouts.place_features(part, shape, tokens, read))


def _is_whole(trace: IndexTrace, source: ir.Value, value: ir.Value) -> bool:
    """Whether a value has all features of its source in the same order."""
    table = trace.feature_indices(source, value).reshape(-1)
    return np.array_equal(table, np.arange(layout_of(trace.flow, source).width))


def _rebuild_single(
    propagation: HeadPropagation, layouts: LayoutBuilder, source: ir.Value, request: HeadRequest
) -> None:
    """Rebuild a projection of which one value has all columns: the projection itself gets other heads."""
    value, count, size = request.values[0], request.axis.count, request.selection.size
    before, after = layout_of(propagation.flow, source), layout_of(propagation.flow, value)
    dims, new_dims = named_dims(before, count, source), named_dims(after, count, value)
    axis = head_axis(before, dims, source)
    sources = tuple(propagation.trace.source(one) for one in request.values)
    new = propagation.propagated(sources, axis, request.selection)
    shapes = [list(before.shape), list(after.shape)]
    for shape, heads in zip(shapes, (axis, request.axis), strict=True):
        shape[heads.axis] = heads.sized(size)
    made = layouts.gather_heads(
        new, shapes[0], with_heads(dims, size), np.arange(size), with_heads(new_dims, size), shapes[1]
    )
    request.placeholder.replace_all_uses_with(made)


def _requested_slice(trace: IndexTrace, source: ir.Value, request: HeadRequest) -> ProjectionSlice:
    """The columns that make the requested heads."""
    value = request.values[0]
    features, layout = trace.feature_indices(source, value), layout_of(trace.flow, value)
    for other in request.values[1:]:
        if not np.array_equal(features, trace.feature_indices(trace.source(other), other)):
            raise UnsupportedError(
                "cannot average layers with different layouts", code=Code.UNTRACEABLE_HEADS, at=other.name
            )
    heads: HeadAxis | None = request.axis
    if layout.parts != layout.shape:
        heads = request.axis.before_reshape(layout.parts, layout.shape)
    if heads is None or heads.axis not in layout.feature_places:
        raise _untraceable(value)
    selection = request.selection.within(int(heads.outer), int(heads.inner))
    number = layout.feature_places.index(heads.axis)
    columns = []
    for terms in zip(*selection.blocks, strict=True):  # one term of each block
        indices = np.concatenate([term.indices for term in terms])
        columns.append(replace(terms[0], indices=np.take(features, indices, axis=number).reshape(-1)))
    parts = [*layout.parts[: heads.axis], selection.size, *layout.parts[heads.axis + 1 :]]
    shape = list(layout.shape)
    shape[request.axis.axis] = request.axis.sized(request.selection.size)
    wanted = replace(layout, parts=tuple(parts), shape=tuple(shape))
    return tuple(columns), wanted, request.placeholder.replace_all_uses_with


def _other_slices(
    trace: IndexTrace, editor: Editor, source: ir.Value, wanted: set[ir.Value]
) -> Iterator[ProjectionSlice]:
    """Yield the columns that make anything that is not `wanted`, separated as early as the new heads allow."""
    flow = trace.flow
    ours = [value for value in wanted if trace.source(value) is source]
    toward = {source, *upstream(ours, stop=lambda value: value is source, inputs=partial(token_inputs, flow))}
    live = find_live(editor.graph)
    pending = [source]
    while pending:
        value = pending.pop(0)
        if value in wanted:
            continue
        readers = [place for place in value.uses() if place[0] in live]
        passed = {node for node, _ in readers if value in toward and _passes(trace, value, node, toward)}
        pending += [one for node in sorted(passed, key=flow.order.__getitem__) for one in node.outputs]
        rest = [(node, index) for node, index in readers if node not in passed]
        if rest:
            columns = Term(indices=trace.feature_indices(source, value).reshape(-1))
            yield (columns,), layout_of(flow, value), partial(_connect, editor, rest)


def _passes(trace: IndexTrace, value: ir.Value, node: ir.Node, toward: set[ir.Value]) -> bool:
    """Whether a node only rearranges elements, and leads to requested heads or separates other ones from them."""
    if not trace.rearranges(node):
        return False
    if any(one in toward for one in node.outputs):
        return True
    width = layout_of(trace.flow, value).width
    return all(layout_of(trace.flow, one).width < width for one in node.outputs)


def _connect(editor: Editor, readers: Iterable[Place], value: ir.Value) -> None:
    for node, index in readers:
        editor.replace_input(node, index, value)


def _untraceable(value: ir.Value) -> UnsupportedError:
    return UnsupportedError("cannot trace the heads of this tensor", code=Code.UNTRACEABLE_HEADS, at=value.name)


def _column_axis(layout: Layout, source: ir.Value) -> int:
    """The axis that holds the columns of a fused projection."""
    wide = [place for place in layout.feature_places if layout.parts[place] != 1]
    axis = len(layout.shape) - 1
    if len(wide) > 1 or layout.shape[axis] != layout.width:
        raise UnsupportedError(
            "the columns of a fused projection are not on its last axis", code=Code.UNTRACEABLE_HEADS, at=source.name,
            expected=f"{layout.width} features on the last axis", found=str(list(layout.shape)),
        )  # fmt: skip
    return axis
