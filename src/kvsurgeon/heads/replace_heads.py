"""Give attentions other key and value heads: the weights make them, and the graph repeats them as often as is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import find_live
from kvsurgeon.heads.arrange import Arrange, lengths_of
from kvsurgeon.heads.counts import counts_of
from kvsurgeon.heads.fused_projections import Stems
from kvsurgeon.heads.index_trace import Labels
from kvsurgeon.heads.layout import Logical, with_heads
from kvsurgeon.heads.propagate import Carrier
from kvsurgeon.heads.regroup_products import Regrouping
from kvsurgeon.heads.repetition import Way, way_of
from kvsurgeon.heads.selection import Selection
from kvsurgeon.heads.structural_equality import Likeness
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What one layer is to have: heads made of those of some layers, the first of which says how."""

    layers: tuple[int, ...]  # whose keys and values are taken
    selection: Selection  # of their heads


class Exchanger:
    """Works on a copy of a model: what is refused half-way is thrown away."""

    def __init__(self, analysis: Analysis, *, lossy: bool) -> None:
        """Take a decoder without a cache; `lossy` where the result is not to compute the same anyway."""
        self.analysis = analysis
        self.flow = analysis.flow
        self.editor = Editor(analysis.model)
        self.labels = Labels(self.flow)
        self.arrange = Arrange(self.editor, lengths_of(self.editor, analysis.inputs))
        self.carrier = Carrier(analysis, self.labels, self.editor, self.arrange.lengths, lossy=lossy)
        self.regrouping = Regrouping(self.flow, self.editor, self.arrange)
        self.counts = tuple(counts_of(self.flow, head) for head in analysis.heads)
        self._ways: dict[int, tuple[tuple[Way, ...], tuple[Way, ...]]] = {}

    def exchange(self, wanted: Sequence[Exchange | None]) -> int:
        """Give each layer what is wanted for it, if anything is; return how many edits that took.

        Raises:
            UnsupportedError: It cannot be proved which weights make the heads of a layer.
        """
        dropped: list[Way] = []
        self._free_shapes(wanted)
        for layer, exchange in enumerate(wanted):
            if exchange is None:
                continue
            for ways in zip(*(self._ways_of(one) for one in (layer, *exchange.layers)), strict=True):
                self._exchange(layer, ways[0], [way[0] for way in ways[1:]], exchange.selection)
                if layer != exchange.layers[0]:
                    dropped += ways[0]
        self.carrier.replace_outputs()
        Stems(self.carrier, self.labels, self.arrange).build(self._freed(dropped))
        self.editor.finish()
        self._give_names_back()
        return self.editor.edits

    def check_alike(self, owner: int, reader: int) -> None:
        """Leave quietly if two layers make keys and values in the same way, but for their weights.

        Raises:
            UnsupportedError: They do not, as where keys are turned by other positions: one cannot read those of the
                other.
        """
        for ours, theirs in zip(self._ways_of(owner), self._ways_of(reader), strict=True):
            found = Likeness(self.analysis, ours[0].start, theirs[0].start).difference()
            if found is not None:
                mine, other = (value.name for value in found)
                raise UnsupportedError(
                    f"cannot read the keys of layer {owner}: they are made in another way after the "
                    f"projection, as where positions turn them otherwise; the ways part at `{mine}`",
                    at=other, layer=reader, hint="let layers read those of layers of their own kind, by --map",
                )  # fmt: skip

    def _ways_of(self, layer: int) -> tuple[tuple[Way, ...], tuple[Way, ...]]:
        """The ways of keys, and those of values."""
        if layer not in self._ways:
            head, counts = self.analysis.heads[layer], self.counts[layer]
            keys, values = (
                tuple(way_of(self.flow, self.labels, layer, head, operand, counts) for operand in operands)
                for operands in (head.keys, head.values)
            )
            self._ways[layer] = keys, values
        return self._ways[layer]

    def _exchange(self, layer: int, ways: Sequence[Way], sources: Sequence[Way], selection: Selection) -> None:
        first = sources[0]
        self.carrier.region = self._region(first)
        new = self.carrier.carried(tuple(way.start for way in sources), first.axis, selection)
        before = with_heads(first.before, selection.size)
        shape = list(self.flow.shapes[first.start].shape or ())
        shape[first.axis.axis] = first.axis.sized(selection.size)
        for way in ways:
            if way.sharing == "broadcast" and selection.size != self.counts[layer].kv_heads:
                self._regroup(layer, way, new, shape, before)
                continue
            heads, after, wanted = self._end(layer, way, selection)
            if way.sharing == "native":
                _tell_operator(way, selection.size)
            value = self.arrange.repeated(new, shape, before, heads, after, wanted, way.start.dtype)
            for node, index in way.readers:
                self.editor.replace_input(node, index, value)

    def _regroup(self, layer: int, way: Way, new: ir.Value, shape: Sequence[Dimension], before: Logical) -> None:
        """Do a product that brings several query heads to a key head for other groups of them."""
        kv_heads, place = int(dict(before)["heads"]), way.operand.place
        wanted = self.regrouping.wanted(place, before)
        sizes = [size for _, size in wanted]
        keys = self.arrange.repeated(new, shape, before, np.arange(kv_heads), wanted, sizes, way.start.dtype)
        self.regrouping.regroup(place, keys, kv_heads, self.counts[layer].heads)

    def _region(self, way: Way) -> frozenset[ir.Node]:
        """The nodes between the projections and the product."""
        nodes = {node for one in self.labels.above(way.last) if (node := one.producer()) is not None}
        return frozenset({*nodes, way.operand.place[0]})

    def _end(self, layer: int, way: Way, selection: Selection) -> tuple[np.ndarray, Logical, list[Dimension]]:
        """The heads that the product is to see, and the layout in which it reads them."""
        counts, new = self.counts[layer], selection.size
        shape = list(self.flow.shapes[way.end].shape or ())
        if way.sharing == "native":
            axis = way.axis.at(way.axis.axis)
            shape[axis.axis] = axis.sized(new)
            return np.arange(new), with_heads(way.after, new), shape
        if new <= counts.kv_heads:
            return way.heads // (counts.kv_heads // new), way.after, shape
        heads = _spread(way.heads, new // counts.kv_heads)
        return heads, with_heads(way.after, len(heads)), shape

    def _free_shapes(self, wanted: Sequence[Exchange | None]) -> None:
        """Let nobody read a tensor for its shape alone, as TorchScript does, or it would stay beside its twin."""
        alive = find_live(self.editor.graph)
        for layer, exchange in enumerate(wanted):
            ways = () if exchange is None else self._ways_of(layer)
            for value in dict.fromkeys(one for way in (*ways[:1], *ways[1:]) for one in self.labels.above(way[0].last)):
                for node in {node for node, _ in value.uses() if node.op_type == "Shape" and node in alive}:
                    numbers = self.flow.shapes[node.outputs[0]].value
                    if numbers is None or not all(dim.is_known(number) for number in numbers):
                        continue
                    sizes = self.arrange.lengths.vector(list(numbers))
                    for user, index in tuple(node.outputs[0].uses()):
                        self.editor.replace_input(user, index, sizes)

    def _freed(self, dropped: Sequence[Way]) -> list[ir.Value]:
        """Parts of a product's result that nobody reads any more, beside others that are read."""
        alive = find_live(self.editor.graph)
        freed: dict[ir.Value, None] = {}
        for way in dropped:
            for value in self.labels.above(way.start):
                node = value.producer()
                read = any(user in alive for user, _ in value.uses())
                if node is not None and node.op_type in ("Split", "Slice", "Gather") and not read:
                    source = self.labels.source(value)
                    if source is not value and any(user in alive for user, _ in source.uses()):
                        freed[value] = None
        return list(freed)

    def _give_names_back(self) -> None:
        """A new initializer takes the name of the old one that nobody reads any more."""
        graph = self.editor.graph
        taken = {value.name for node in graph for value in node.outputs} | {value.name for value in graph.inputs}
        for name, new in self.carrier.renamed.items():
            if name not in graph.initializers and name not in taken and new.name in graph.initializers:
                graph.initializers.pop(new.name or "")
                new.name = name
                graph.register_initializer(new)


def _spread(heads: np.ndarray, times: int) -> np.ndarray:
    """Share readers of each old head out among its copies, neighbours together."""
    rank = np.array([np.count_nonzero(heads[:place] == head) for place, head in enumerate(heads)])
    each = np.bincount(heads)[heads] // times
    return np.asarray(heads * times + rank // each)


def _tell_operator(way: Way, heads: int) -> None:
    """An operator that finds heads and features on one axis is told how many heads there are."""
    node = way.operand.place[0]
    if "kv_num_heads" in node.attributes:
        node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", heads)
