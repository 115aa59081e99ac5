"""Fused projections: one product that computes several of queries, keys and values, in any column order.

An index trace shows which columns make which heads. The columns of the new product are `[others | keys | values]`,
slice by slice; a `Split` and a reshape of each slice replace the nodes that separated them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.token_data import token_inputs
from kvsurgeon.analysis.token_flow import Place
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.query import find_live, upstream
from kvsurgeon.heads.head_axis import HeadAxis
from kvsurgeon.heads.layout import Layout, head_axis, layout_of, named_dims, with_heads
from kvsurgeon.heads.layout_builder import LayoutBuilder
from kvsurgeon.heads.propagate import HeadPropagation, HeadRequest
from kvsurgeon.heads.selection import Selection, Term, Terms


@dataclass(frozen=True, kw_only=True, eq=False)
class ProjectionSlice:
    """Columns of a fused projection.

    Attributes:
        columns: The columns, in the order of the layout's features.
        layout: The layout in which they are read.
        placeholder: The value that is read in place of new heads so far.
        readers: The node inputs that read unchanged columns.
    """

    columns: Terms
    layout: Layout
    placeholder: ir.Value | None = None
    readers: tuple[Place, ...] = ()


class FusedProjections:
    """Rebuilds fused projections with the heads that were requested of their slices."""

    def __init__(self, propagation: HeadPropagation, layouts: LayoutBuilder) -> None:
        self.propagation = propagation
        self.trace = propagation.trace
        self.flow = propagation.flow
        self.layouts = layouts
        self._unused: set[ir.Value] = set()

    def rebuild(self, unused: Iterable[ir.Value] = ()) -> None:
        """Rebuild projections until no request is left; drop the columns of values that are `unused`."""
        self._unused = set(unused)
        shrunk = {self.trace.source(value) for value in self._unused}
        requests: dict[ir.Value, list[HeadRequest]] = {}
        done = self._collect(requests, 0)
        while requests or shrunk:
            last = max({*requests, *shrunk}, key=self._order)
            shrunk.discard(last)
            self._rebuild(last, requests.pop(last, []))
            done = self._collect(requests, done)

    def _order(self, value: ir.Value) -> int:
        node = value.producer()
        return -1 if node is None else self.flow.order[node]

    def _collect(self, requests: dict[ir.Value, list[HeadRequest]], done: int) -> int:
        """Add the requests since the last call by the projection that they need; return how many there are."""
        for request in self.propagation.requests[done:]:
            source = self.trace.source(request.values[0])
            if source is request.values[0]:
                raise _untraceable(source)
            requests.setdefault(source, []).append(request)
        return len(self.propagation.requests)

    def _rebuild(self, source: ir.Value, requests: list[HeadRequest]) -> None:
        layout = layout_of(self.flow, source)
        others = self._other_slices(source, requests)
        if not others and len(requests) == 1 and self._is_whole(source, requests[0].values[0]):
            self._rebuild_single(source, requests[0])
            return
        axis = _column_axis(layout, source)
        slices = [*others, *(self._slice(source, request) for request in requests)]
        longest = max((request.values for request in requests), key=len, default=())
        sources = (source, *(self.trace.source(value) for value in longest[1:]))  # of layers that are averaged
        columns = Selection(layout.width, tuple(one.columns for one in slices))
        new = self.propagation.propagated(sources, HeadAxis(axis, layout.width), columns)
        sizes = [one.layout.width for one in slices]
        parts = self.propagation.editor.split(new, sizes, axis, name=f"{source.name}.pieces")
        tokens = [layout.parts[place] for place in layout.token_places]
        for one, part in zip(slices, parts, strict=True):
            shape = (*layout.shape[:axis], one.layout.width)
            value = self.layouts.place_features(part, shape, tokens, one.layout)
            if one.placeholder is not None:
                one.placeholder.replace_all_uses_with(value)
            for node, index in one.readers:
                self.propagation.editor.replace_input(node, index, value)

    def _is_whole(self, source: ir.Value, value: ir.Value) -> bool:
        """Whether a value has all features of its source in the same order."""
        table = self.trace.feature_indices(source, value).reshape(-1)
        return np.array_equal(table, np.arange(layout_of(self.flow, source).width))

    def _rebuild_single(self, source: ir.Value, request: HeadRequest) -> None:
        """Make all that a source computes with other heads, in the layout that is read."""
        value, count, size = request.values[0], request.axis.count, request.selection.size
        before, after = layout_of(self.flow, source), layout_of(self.flow, value)
        dims, new_dims = named_dims(before, count, source), named_dims(after, count, value)
        axis = head_axis(before, dims, source)
        sources = tuple(self.trace.source(one) for one in request.values)
        new = self.propagation.propagated(sources, axis, request.selection)
        shapes = [list(before.shape), list(after.shape)]
        for shape, heads in zip(shapes, (axis, request.axis), strict=True):
            shape[heads.axis] = heads.sized(size)
        made = self.layouts.gather_heads(
            new, shapes[0], with_heads(dims, size), np.arange(size), with_heads(new_dims, size), shapes[1]
        )
        request.placeholder.replace_all_uses_with(made)

    def _slice(self, source: ir.Value, request: HeadRequest) -> ProjectionSlice:
        """The columns that make the requested heads."""
        value = request.values[0]
        features, layout = self.trace.feature_indices(source, value), layout_of(self.flow, value)
        for other in request.values[1:]:
            if not np.array_equal(features, self.trace.feature_indices(self.trace.source(other), other)):
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
        return ProjectionSlice(columns=tuple(columns), layout=wanted, placeholder=request.placeholder)

    def _other_slices(self, source: ir.Value, requests: list[HeadRequest]) -> list[ProjectionSlice]:
        """The columns that make anything else, separated as early as the new heads allow."""
        wanted = {request.values[0] for request in requests} | self._unused
        ours = [value for value in wanted if self.trace.source(value) is source]
        toward = {source, *upstream(ours, stop=lambda value: value is source, inputs=partial(token_inputs, self.flow))}
        live = find_live(self.propagation.editor.graph)
        found: list[ProjectionSlice] = []
        pending = [source]
        while pending:
            value = pending.pop(0)
            if value in wanted:
                continue
            readers = [place for place in value.uses() if place[0] in live]
            passed = {node for node, _ in readers if value in toward and self._passes(value, node, toward)}
            pending += [one for node in sorted(passed, key=self.flow.order.__getitem__) for one in node.outputs]
            rest = tuple((node, index) for node, index in readers if node not in passed)
            if rest:
                columns = Term(indices=self.trace.feature_indices(source, value).reshape(-1))
                found.append(ProjectionSlice(columns=(columns,), layout=layout_of(self.flow, value), readers=rest))
        return found

    def _passes(self, value: ir.Value, node: ir.Node, toward: set[ir.Value]) -> bool:
        """Whether a node only rearranges elements, and leads to requested heads or separates other ones from them."""
        if not self.trace.rearranges(node):
            return False
        if any(one in toward for one in node.outputs):
            return True
        width = layout_of(self.flow, value).width
        return all(layout_of(self.flow, one).width < width for one in node.outputs)


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
