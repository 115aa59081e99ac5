"""Replace the KV heads of attention layers: other weights, and as much repetition in the graph as is left."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.token_data import upstream_tokens
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import find_live, producers, upstream
from kvsurgeon.heads.counts import counts_of
from kvsurgeon.heads.fused_projections import rebuild_projections
from kvsurgeon.heads.grouped_products import grouped_dims, regroup_product
from kvsurgeon.heads.index_trace import IndexTrace
from kvsurgeon.heads.layout import NamedDims, with_heads
from kvsurgeon.heads.layout_builder import LayoutBuilder
from kvsurgeon.heads.propagate import HeadPropagation
from kvsurgeon.heads.repetition import HeadRepetition, find_repetition
from kvsurgeon.heads.selection import Selection
from kvsurgeon.heads.structural_equality import find_difference
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension

# New KV heads of a layer: the layers from whose weights they are computed, and which heads of these layers. The first
# of the layers also gives the nodes that compute them.
NewHeads = tuple[tuple[int, ...], Selection]


class HeadReplacer:
    """Replaces KV heads in a model, which is left half-edited if it raises.

    Attributes:
        counts: Sizes of each attention layer before.
    """

    def __init__(self, analysis: Analysis, *, lossy: bool) -> None:
        """Prepare a decoder without a cache; `lossy` if its results may change."""
        self.analysis = analysis
        self.flow = analysis.flow
        self.editor = Editor(analysis.model)
        self.trace = IndexTrace(self.flow)
        self.layouts = LayoutBuilder(self.editor, analysis.inputs)
        self.propagation = HeadPropagation(analysis, self.trace, self.editor, self.layouts.lengths, lossy=lossy)
        self.counts = tuple(counts_of(self.flow, site) for site in analysis.sites)
        self._repetitions: dict[int, tuple[tuple[HeadRepetition, ...], tuple[HeadRepetition, ...]]] = {}

    def replace(self, wanted: Sequence[NewHeads | None]) -> int:
        """Give each layer its new heads, if any; return the number of edits.

        Raises:
            UnsupportedError: The weights of a layer's heads cannot be found.
        """
        unused: list[HeadRepetition] = []
        self._find_repetitions(wanted)
        self._replace_shape_reads([layer for layer, new in enumerate(wanted) if new is not None])
        for layer, new in enumerate(wanted):
            if new is None:
                continue
            sources, selection = new
            for own, *others in zip(*map(self._repetitions_of, (layer, *sources)), strict=True):
                self._replace_each(layer, own, others, selection)
                if layer != sources[0]:
                    unused += own
        return self._finished(unused)

    def replace_in_place(self, wanted: Sequence[NewHeads | None]) -> int:
        """Give each layer the weights of its new heads, and leave the graph behind the projections as it is.

        A head that is the mean of several takes the place of each of them, so that no product is connected to other
        heads. The result computes what `replace` computes, and shows whether that connected every product correctly.

        Raises:
            UnsupportedError: The weights of a layer's heads cannot be found.
        """
        self._find_repetitions(wanted)
        for layer, new in enumerate(wanted):
            if new is None:
                continue
            sources, selection = new
            for own, *others in zip(*map(self._repetitions_of, (layer, *sources)), strict=True):
                for one, *starts in zip(own, *others, strict=True):
                    self._replace_start(one, starts, selection.in_place)
        return self._finished([])

    def _replace_start(self, one: HeadRepetition, sources: Sequence[HeadRepetition], selection: Selection) -> None:
        """Replace the keys or values of a product, before any repetition, by those of other weights."""
        self.propagation.region = self._region(sources[0])
        new = self.propagation.propagated(tuple(source.start for source in sources), sources[0].axis, selection)
        below = producers(upstream([one.value], stop=lambda value: value is one.start))
        for node, index in tuple(one.start.uses()):
            if node in below or (node, index) == one.operand.place:
                self.editor.replace_input(node, index, new)

    def _region(self, source: HeadRepetition) -> frozenset[ir.Node]:
        return frozenset({*producers(upstream_tokens(self.flow, source.value)), source.operand.place[0]})

    def _finished(self, unused: Sequence[HeadRepetition]) -> int:
        """Write the new projections, remove what is unused, and return the number of edits."""
        self.propagation.replace_outputs()
        rebuild_projections(self.propagation, self.layouts, self._unused_slices(unused))
        self.editor.finish()
        self._restore_initializer_names()
        return self.editor.edits

    def check_same_computation(self, owner: int, reader: int) -> None:
        """Check that two layers compute keys and values by the same nodes, apart from weights.

        Raises:
            UnsupportedError: They do not, for example because their rotary embeddings differ.
        """
        pairs = zip(
            *map(chain.from_iterable, (self._repetitions_of(owner), self._repetitions_of(reader))), strict=False
        )
        for ours, theirs in pairs:
            found = find_difference(self.analysis, ours.start, theirs.start)
            if found is not None:
                mine, other = (value.name for value in found)
                raise UnsupportedError(
                    f"cannot share keys and values with layer {owner}: they are computed differently after the "
                    "projection",
                    code=Code.UNTRACEABLE_HEADS, expected=f"a value equal to `{mine}`", at=other, layer=reader,
                    hint="share only among layers with equal rotary embeddings, by --map",
                )  # fmt: skip

    def _find_repetitions(self, wanted: Sequence[NewHeads | None]) -> None:
        """Find the repetitions of all layers before the first edit: layers may share them."""
        for layer, new in enumerate(wanted):
            for one in () if new is None else (layer, *new[0]):
                self._repetitions_of(one)

    def _repetitions_of(self, layer: int) -> tuple[tuple[HeadRepetition, ...], tuple[HeadRepetition, ...]]:
        """The repetitions of keys, and those of values."""
        if layer not in self._repetitions:
            site, counts = self.analysis.sites[layer], self.counts[layer]
            keys, values = (
                tuple(find_repetition(self.trace, layer, site, operand, counts) for operand in operands)
                for operands in (site.keys, site.values)
            )
            self._repetitions[layer] = keys, values
        return self._repetitions[layer]

    def _replace_each(
        self,
        layer: int,
        own: Sequence[HeadRepetition],
        others: Sequence[Sequence[HeadRepetition]],
        selection: Selection,
    ) -> None:
        """Connect the products of a layer to keys or values; those that read the same heads share the new ones.

        Raises:
            UnsupportedError: Another layer has other products.
        """
        for one in others:
            if _groups(one) != _groups(own):
                raise UnsupportedError(
                    "cannot share keys and values with a layer whose products are others",
                    code=Code.UNTRACEABLE_HEADS, at=one[0].value.name, layer=layer,
                )  # fmt: skip
        for group in _groups(own):
            self._replace(layer, [own[index] for index in group], [one[group[0]] for one in others], selection)

    def _replace(
        self, layer: int, readers: Sequence[HeadRepetition], sources: Sequence[HeadRepetition], selection: Selection
    ) -> None:
        """Connect the products of a layer to keys or values with new heads."""
        first, counts = sources[0], self.counts[layer]
        self.propagation.region = self._region(first)
        new = self.propagation.propagated(tuple(one.start for one in sources), first.axis, selection)
        dims = with_heads(first.start_dims, selection.size)
        shape = self._shape(first.start)
        shape[first.axis.axis] = first.axis.sized(selection.size)
        for one in readers:
            place, kv_heads = one.operand.place, selection.size
            if one.sharing == "broadcast" and kv_heads != counts.kv_heads:
                grouped = grouped_dims(self.flow, place, dims)
                sizes = [size for _, size in grouped]
                keys = self.layouts.gather_heads(new, shape, dims, np.arange(kv_heads), grouped, sizes)
                regroup_product(self.flow, self.layouts, place, keys, kv_heads, counts.heads)
                continue
            heads, new_dims, new_shape = self._end(layer, one, kv_heads)
            if one.sharing == "native" and "kv_num_heads" in place[0].attributes:
                place[0].attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", kv_heads)
            value = self.layouts.gather_heads(new, shape, dims, heads, new_dims, new_shape)
            for node, index in one.readers:
                self.editor.replace_input(node, index, value)

    def _shape(self, value: ir.Value) -> list[Dimension]:
        return list(self.flow.shapes[value].shape or ())

    def _end(
        self, layer: int, repetition: HeadRepetition, kv_heads: int
    ) -> tuple[np.ndarray, NamedDims, list[Dimension]]:
        """The new heads that the product reads, their dimensions and their shape."""
        before, shape = self.counts[layer].kv_heads, self._shape(repetition.end)
        if repetition.sharing == "native":
            shape[repetition.axis.axis] = repetition.axis.sized(kv_heads)
            return np.arange(kv_heads), with_heads(repetition.end_dims, kv_heads), shape
        if kv_heads <= before:
            return repetition.heads // (before // kv_heads), repetition.end_dims, shape
        heads = _distribute(repetition.heads, kv_heads // before)
        return heads, with_heads(repetition.end_dims, len(heads)), shape

    def _replace_shape_reads(self, layers: Sequence[int]) -> None:
        """Replace `Shape` nodes that read tensors with new heads: they would keep the old tensors alive."""
        live = find_live(self.editor.graph)
        ends = [one.value for layer in layers for one in chain.from_iterable(self._repetitions_of(layer))]
        computed = (value for end in ends for value in upstream_tokens(self.flow, end) if value.producer() is not None)
        for value in dict.fromkeys(computed):
            for node in {node for node, _ in value.uses() if node.op_type == "Shape" and node in live}:
                numbers = self.flow.shapes[node.outputs[0]].value
                if numbers is None or not all(dim.is_known(number) for number in numbers):
                    continue
                sizes = self.layouts.lengths.vector(list(numbers))
                for user, index in tuple(node.outputs[0].uses()):
                    self.editor.replace_input(user, index, sizes)

    def _unused_slices(self, unused: Sequence[HeadRepetition]) -> list[ir.Value]:
        """Slices of fused projections that nothing reads any more, if other slices are read."""
        live = find_live(self.editor.graph)

        def is_read(value: ir.Value) -> bool:
            return any(user in live for user, _ in value.uses())

        found: dict[ir.Value, None] = {}
        for repetition in unused:
            for value in upstream_tokens(self.flow, repetition.start):
                node, source = value.producer(), self.trace.source(value)
                is_slice = has_trait(node, Trait.SELECT) and source is not value
                if is_slice and not is_read(value) and is_read(source):
                    found[value] = None
        return list(found)

    def _restore_initializer_names(self) -> None:
        """Give new initializers the names of the removed ones that they replace."""
        graph = self.editor.graph
        taken = {value.name for node in graph for value in node.outputs} | {value.name for value in graph.inputs}
        for name, new in self.propagation.renamed.items():
            if name not in graph.initializers and name not in taken and new.name in graph.initializers:
                graph.initializers.pop(new.name or "")
                new.name = name
                graph.register_initializer(new)


def _groups(repetitions: Sequence[HeadRepetition]) -> list[list[int]]:
    """Return the indices of repetitions in groups that start at the same value."""
    groups: dict[ir.Value, list[int]] = {}
    for index, one in enumerate(repetitions):
        groups.setdefault(one.start, []).append(index)
    return list(groups.values())


def _distribute(heads: np.ndarray, times: int) -> np.ndarray:
    """Distribute the readers of each head among its copies, neighbors together."""
    rank = np.array([np.count_nonzero(heads[:place] == head) for place, head in enumerate(heads)])
    each = np.bincount(heads)[heads] // times
    return np.asarray(heads * times + rank // each)
