"""One product that makes several things: queries, keys and values side by side, in whatever order.

Which of its columns make which heads is read off labels. Its new columns are [others | keys | values], piece after
piece, and a `Split` with a reshape for each piece takes the place of the layout that was there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.token_flow import Place
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.query import find_live
from kvsurgeon.heads.arrange import Arrange
from kvsurgeon.heads.head_axis import HeadAxis
from kvsurgeon.heads.index_trace import Labels
from kvsurgeon.heads.layout import Layout, head_axis, layout_of, logical, with_heads
from kvsurgeon.heads.propagate import Carrier, Request
from kvsurgeon.heads.selection import Member, Members, joined


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """A part of a stem that its readers want: the columns that it is made of, and the layout that they want it in."""

    name: str
    members: Members  # columns of the stem, in the order of the layout's features
    layout: Layout
    stand_in: ir.Value | None = None  # what readers of new heads read so far
    readers: tuple[Place, ...] = ()  # of heads that stay as they are


class Stems:
    """Builds stems anew until no request is left."""

    def __init__(self, carrier: Carrier, labels: Labels, arrange: Arrange) -> None:
        self.carrier = carrier
        self.labels = labels
        self.arrange = arrange
        self.flow = carrier.flow
        self._freed: set[ir.Value] = set()

    def build(self, freed: Iterable[ir.Value] = ()) -> None:
        """Make everything that was requested; drop the columns of values that are `freed`, whom nobody reads now."""
        requests = self._by_source(self.carrier.requests)
        self._freed = set(freed)
        shrunk = {self.labels.source(value) for value in self._freed}
        done = 0
        while requests or shrunk:
            done = len(self.carrier.requests)
            latest = max({*requests, *shrunk}, key=self._order)
            shrunk.discard(latest)
            self._build(latest, requests.pop(latest, []))
            for source, more in self._by_source(self.carrier.requests[done:]).items():
                requests.setdefault(source, []).extend(more)

    def _order(self, value: ir.Value) -> int:
        node = value.producer()
        return -1 if node is None else self.flow.order[node]

    def _by_source(self, requests: Iterable[Request]) -> dict[ir.Value, list[Request]]:
        found: dict[ir.Value, list[Request]] = {}
        for request in requests:
            source = self.labels.source(request.values[0])
            if source is request.values[0]:
                raise UnsupportedError("heads cannot be followed here", at=source.name)
            found.setdefault(source, []).append(request)
        return found

    def _build(self, source: ir.Value, requests: list[Request]) -> None:
        layout = layout_of(self.flow, source)
        others = self._others(source, requests)
        if not others and len(requests) == 1 and self._is_whole(source, requests[0]):
            self._build_alone(source, requests[0])
            return
        axis = _columns(layout, source)
        pieces = [*others, *(self._piece(source, request) for request in requests)]
        selection = joined(layout.width, (piece.members for piece in pieces))
        sources = self._sources(source, requests)
        new = self.carrier.carried(sources, HeadAxis(axis, layout.width), selection)
        sizes = [piece.layout.width for piece in pieces]
        parts = self.carrier.editor.split(new, sizes, axis, name=f"{source.name}.pieces")
        tokens = [layout.parts[place] for place in layout.token_places]
        for piece, part in zip(pieces, parts, strict=True):
            shape = (*layout.shape[:axis], piece.layout.width)
            self._give(piece, self.arrange.placed(part, tokens, shape, piece.layout, source.dtype))

    def _is_whole(self, source: ir.Value, request: Request) -> bool:
        """Whether a value holds all of its source, feature by feature in the same order."""
        table = self.labels.features(source, request.values[0]).reshape(-1)
        return np.array_equal(table, np.arange(layout_of(self.flow, source).width))

    def _build_alone(self, source: ir.Value, request: Request) -> None:
        """One thing that a source makes, in another layout: its heads are followed further up."""
        value, count, size = request.values[0], request.axis.count, request.selection.size
        layout, wanted = layout_of(self.flow, source), layout_of(self.flow, value)
        before, after = logical(layout, count, source), logical(wanted, count, value)
        axis = head_axis(layout, before)
        if axis is None:
            raise UnsupportedError("heads lie in pieces", at=source.name)
        sources = tuple(self.labels.source(one) for one in request.values)
        new = self.carrier.carried(sources, axis, request.selection)
        shapes = [list(layout.shape), list(wanted.shape)]
        for shape, heads in zip(shapes, (axis, request.axis), strict=True):
            shape[heads.axis] = heads.sized(size)
        made = self.arrange.repeated(
            new, shapes[0], with_heads(before, size), np.arange(size), with_heads(after, size), shapes[1], value.dtype
        )
        request.stand_in.replace_all_uses_with(made)

    def _give(self, piece: Piece, value: ir.Value) -> None:
        if piece.stand_in is not None:
            piece.stand_in.replace_all_uses_with(value)
        for node, index in piece.readers:
            self.carrier.editor.replace_input(node, index, value)

    def _sources(self, source: ir.Value, requests: list[Request]) -> tuple[ir.Value, ...]:
        """The stem, and those of the layers that are averaged into it."""
        longest = max((request.values for request in requests), key=len, default=())
        return (source, *(self.labels.source(value) for value in longest[1:]))

    def _piece(self, source: ir.Value, request: Request) -> Piece:
        value = request.values[0]
        features, layout = self.labels.features(source, value), layout_of(self.flow, value)
        for other in request.values[1:]:
            theirs = self.labels.features(self.labels.source(other), other)
            if not np.array_equal(features, theirs):
                raise UnsupportedError("layers that are to be averaged do not lie alike", at=other.name)
        place, outer, inner = self._heads_part(value, layout, request.axis)
        selection = request.selection.within(outer, inner)
        members = self._one_block(request, outer, inner)
        number = layout.feature_places.index(place)
        columns = tuple(
            replace(member, places=np.take(features, member.places, axis=number).reshape(-1)) for member in members
        )
        parts = [*layout.parts[:place], selection.size, *layout.parts[place + 1 :]]
        shape = list(layout.shape)
        shape[request.axis.axis] = request.axis.sized(request.selection.size)
        wanted = replace(layout, parts=tuple(parts), shape=tuple(shape))
        return Piece(name=value.name or "", members=columns, layout=wanted, stand_in=request.stand_in)

    def _one_block(self, request: Request, outer: int, inner: int) -> Members:
        """The members of all blocks joined: as many blocks as there are heads outside, each with as many members."""
        blocks = request.selection.within(outer, inner).blocks
        return tuple(
            Member(places=np.concatenate([one.places for one in ones]), source=ones[0].source, weight=ones[0].weight)
            for ones in zip(*blocks, strict=True)
        )

    def _heads_part(self, value: ir.Value, layout: Layout, axis: HeadAxis) -> tuple[int, int, int]:
        """The part of a layout that holds the heads, and what is outside and inside them on it."""
        parts = self.labels.sizes(layout.parts, value)
        (inner,) = self.labels.sizes([axis.inner], value)
        mine = _parts_of_axis(self.labels.shape(value), parts, axis.axis)
        for place in mine:
            right = math.prod(parts[other] for other in mine if other > place)
            within, rest = divmod(inner, right)
            outer, more = divmod(parts[place], axis.count * max(within, 1))
            if place in layout.feature_places and not rest and not more and within:
                return place, outer, within
        raise UnsupportedError("heads cannot be followed here", at=value.name)

    def _others(self, source: ir.Value, requests: list[Request]) -> list[Piece]:
        """What else the stem makes, taken as early as the new heads allow."""
        wanted = {request.values[0] for request in requests} | self._freed
        toward = self._toward(source, wanted)
        alive = find_live(self.carrier.editor.graph)
        found: list[Piece] = []
        pending = [source]
        while pending:
            value = pending.pop(0)
            if value in wanted:
                continue
            readers = [place for place in value.uses() if place[0] in alive]
            through = {node for node, _ in readers if value in toward and self.labels.moves(node)}
            through = {node for node in through if self._leads_on(value, node, toward | wanted)}
            pending += [one for node in sorted(through, key=self.flow.order.__getitem__) for one in node.outputs]
            rest = tuple((node, index) for node, index in readers if node not in through)
            if rest:
                features = self.labels.features(source, value)
                found.append(
                    Piece(
                        name=value.name or "", members=(Member(places=features.reshape(-1)),),
                        layout=layout_of(self.flow, value), readers=rest,
                    )
                )  # fmt: skip
        return found

    def _leads_on(self, value: ir.Value, node: ir.Node, wanted: set[ir.Value]) -> bool:
        """Whether a node is on the way to what is wanted, or takes a part beside it."""
        if any(one in wanted for one in node.outputs):
            return True
        width = layout_of(self.flow, value).width
        return all(layout_of(self.flow, one).width < width for one in node.outputs)

    def _toward(self, source: ir.Value, wanted: set[ir.Value]) -> set[ir.Value]:
        """The values between the stem and what is wanted of it; all of its parts where nothing is."""
        found: set[ir.Value] = {source}
        pending = [value for value in wanted if self.labels.source(value) is source]
        while pending:
            value = pending.pop()
            if value is source:
                continue
            node = value.producer()
            assert node is not None
            more = [one for one in self.labels.token_sources(node) if one not in found]
            found.update(more)
            pending += more
        return found


def _parts_of_axis(shape: Sequence[int], parts: Sequence[int], axis: int) -> list[int]:
    """Places of the parts that an axis was cut into."""
    place = 0
    for at, size in enumerate(shape):
        mine, whole = [place], parts[place]
        while whole < size:
            mine.append(place + len(mine))
            whole *= parts[mine[-1]]
        if at == axis:
            return mine
        place += len(mine)
    return []


def _columns(layout: Layout, source: ir.Value) -> int:
    """The axis of the stem's columns."""
    wide = [place for place in layout.feature_places if layout.parts[place] != 1]
    axis = len(layout.shape) - 1
    if len(wide) > 1 or layout.shape[axis] != layout.width:
        raise UnsupportedError(
            "what a product makes side by side does not lie on its last axis", at=source.name,
            expected=f"{layout.width} features on the last axis", found=str(list(layout.shape)),
        )  # fmt: skip
    return axis
