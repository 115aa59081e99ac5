"""The way of keys and of values from where they are remembered to the product, and where on it heads become more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import AttentionSite, CachedOperand
from kvsurgeon.analysis.cache_points import cache_point_of
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.heads.counts import HeadCounts
from kvsurgeon.heads.head_axis import HeadAxis
from kvsurgeon.heads.index_trace import Labels
from kvsurgeon.heads.layout import Logical, head_axis, layout_of, logical
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait

# How a product comes to more query heads than there are key heads: they were repeated before it, they are broadcast
# by it, or the operator itself shares them.
Sharing = Literal["repeated", "broadcast", "native"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Way:
    """From the tensor with the key heads, each once, to the one that the product reads, or all but."""

    layer: int
    operand: CachedOperand
    last: ir.Value  # what the product reads
    sharing: Sharing
    start: ir.Value  # with each head once
    end: ir.Value  # with as many as the product sees; the same value where none is repeated
    heads: np.ndarray  # [heads of the end]: which head of the start each is
    axis: HeadAxis  # of the start
    before: Logical  # the start's axes
    after: Logical  # the end's
    width: int  # features of one head
    readers: tuple[tuple[ir.Node, int], ...]  # of the end, on the way to this product


def way_of(
    flow: TokenFlow, labels: Labels, layer: int, head: AttentionSite, operand: CachedOperand, counts: HeadCounts
) -> Way:
    """Return the way of keys or values of an attention.

    Raises:
        UnsupportedError: Heads cannot be followed on it.
    """
    try:
        return _Walk(flow, labels, layer, head, operand, counts).way()
    except UnsupportedError as refusal:
        if refusal.layer is None:
            refusal.layer = layer
        raise


class _Walk:
    def __init__(
        self,
        flow: TokenFlow,
        labels: Labels,
        layer: int,
        head: AttentionSite,
        operand: CachedOperand,
        counts: HeadCounts,
    ) -> None:
        self.flow, self.labels, self.layer, self.head = flow, labels, layer, head
        self.operand, self.counts = operand, counts
        node, index = operand.place
        value = node.inputs[index]
        assert value is not None
        self.last = value
        self.between = self._between()

    def _between(self) -> set[ir.Node]:
        """The nodes between what is remembered and the product, that included."""
        found, pending = {self.operand.place[0]}, [self.last]
        while pending:
            value = pending.pop()
            node = value.producer()
            if value is self.operand.memory.value or node is None or node in found:
                continue
            found.add(node)
            pending += self.labels.token_sources(node)
        return found

    def way(self) -> Way:
        start, end = self._repetition()
        features = self._features
        if start is end:
            return self._unrepeated(features)
        table = self.labels.features(start, end).reshape(-1, features)
        heads, wrong = np.divmod(table, features)
        if not (wrong == np.arange(features)).all() or not (heads == heads[:, :1]).all():
            raise UnsupportedError("heads are not repeated whole", at=end.name)
        return self._made("repeated", start, end, heads[:, 0], features)

    def _repetition(self) -> tuple[ir.Value, ir.Value]:
        """The last value with each head once, and the last one that is a mere repetition of it."""
        single = self.counts.kv_heads * self._features
        for path in (self._up_from_product(), self._down_from_memory(), *self._growing()):
            widths = [layout_of(self.flow, value).width for value in path]
            if single not in widths or max(widths) == single:
                continue
            first = last = len(widths) - 1 - widths[::-1].index(single)
            while last + 1 < len(path) and self.labels.moves(path[last + 1].producer()):
                last += 1
            self.between |= {node for one in path[first + 1 :] if (node := one.producer()) is not None}
            return path[first], path[last]
        return self.last, self.last

    @property
    def _features(self) -> int:
        return self.counts.value_dim if self.operand in self.head.values else self.counts.head_dim

    def _up_from_product(self) -> list[ir.Value]:
        """Values from the last one that several are made into, down to the product's operand."""
        path = [self.last]
        while True:
            node = path[0].producer()
            sources = [] if node is None else self.labels.token_sources(node)
            if node is None or not self.labels.keeps_apart(node) or len(sources) != 1 or not self._is_plain(sources[0]):
                return path
            path.insert(0, sources[0])

    def _down_from_memory(self) -> list[ir.Value]:
        """Values from what is remembered down to where several are made into one."""
        path = [self.operand.memory.value]
        while path[-1] is not self.last:
            nodes = {node for node, _ in path[-1].uses() if node in self.between}
            node = nodes.pop() if len(nodes) == 1 else None
            if node is None or not self.labels.keeps_apart(node) or len(self.labels.token_sources(node)) != 1:
                break
            outputs = [one for one in node.outputs if any(user in self.between for user, _ in one.uses())]
            if not outputs or not self._is_plain(outputs[0]):
                break
            path.append(outputs[0])
        return path

    def _growing(self) -> Iterator[list[ir.Value]]:
        """Ways on which heads are repeated before they are remembered."""
        pending, seen = [self.operand.memory.value], set[ir.Value]()
        while pending:
            value = pending.pop(0)
            node = value.producer()
            if value in seen or node is None or has_trait(node, Trait.PROJECTION):
                continue
            seen.add(value)
            sources = [one for one in self.labels.token_sources(node) if self.labels.is_projected(one)]
            pending += sources
            alone = len(sources) == 1 and self.labels.moves(node)  # what joins several parts makes no head again
            if not alone or not self._is_plain(value) or not self._is_plain(sources[0]):
                continue
            if layout_of(self.flow, value).width > layout_of(self.flow, sources[0]).width:
                self.between |= {node, *(user for user, _ in value.uses())}
                yield self._down(sources[0], value)

    def _down(self, *path: ir.Value) -> list[ir.Value]:
        """The values that are made of the last one by nothing but moves, each the only thing made of the one before."""
        found = list(path)
        while len(users := {node for node, _ in found[-1].uses()}) == 1 and self.labels.moves(node := users.pop()):
            if len(node.outputs) > 1 or not self._is_plain(node.outputs[0]):
                break
            found.append(node.outputs[0])
            self.between |= {user for user, _ in found[-1].uses()}
        return found

    def _is_plain(self, value: ir.Value) -> bool:
        return cache_point_of(self.flow, value) is not None

    def _unrepeated(self, features: int) -> Way:
        last, count = self.last, self.counts.kv_heads
        path = self._up_from_product()
        if layout_of(self.flow, last).width != features * count:
            raise UnsupportedError("where heads are repeated before the product cannot be followed", at=last.name)
        if self.head.fused is not None:
            return self._made("native", last, last, np.arange(count), features)
        if count == self.counts.heads:
            memory = self.operand.memory.value
            early = memory if memory in path else path[0]
            return self._made("repeated", early, early, np.arange(count), features)
        return self._made("broadcast", last, last, np.arange(count), features)

    def _made(self, sharing: Sharing, start: ir.Value, end: ir.Value, heads: np.ndarray, features: int) -> Way:
        layout = layout_of(self.flow, start)
        count = layout.width // features
        before = logical(layout, count, start)
        after = logical(layout_of(self.flow, end), len(heads), end)
        axis = head_axis(layout, before)
        if axis is None:
            raise UnsupportedError("heads lie in pieces", at=start.name)
        if start is end and sharing != "repeated":
            readers = [self.operand.place]
        else:
            readers = [(node, index) for node, index in end.uses() if node in self.between]
        return Way(
            layer=self.layer, operand=self.operand, last=self.last, sharing=sharing, start=start, end=end,
            heads=heads, axis=axis, before=before, after=after, width=features, readers=tuple(readers),
        )  # fmt: skip
