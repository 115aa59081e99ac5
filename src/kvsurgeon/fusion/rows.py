"""Token data as [batch, sequence, heads * head_dim], which is how it comes from a projection and goes into the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.cache_points import CachePoint, describe
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.fusion.context import Setting, Sizes
from kvsurgeon.fusion.score_path import MOVES
from kvsurgeon.heads.index_trace import Labels
from kvsurgeon.rewrite.dimension_names import dim_names
from kvsurgeon.rewrite.reshape_targets import reshape_target
from kvsurgeon.symbolic.dimension import Dimension

_PARTS = (0, 2, 1, 3)  # [batch, heads, sequence, head_dim] as [batch, sequence, heads, head_dim], and back


class Rows:
    """Brings tensors into rows of tokens and back, over as few operators as possible."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.editor = setting.editor
        self.labels = Labels(setting.flow)

    def rows_of(self, memory: CachePoint) -> ir.Value:
        """The tensor as rows; those that it was made of, where it is these and no more."""
        for value in self._made_of(memory.value):
            if not self._same_order(value, memory.value):
                break
            if self._is_by_token(value):
                return self._reshaped(value, self.setting.of_tokens(value), self._flat(memory), memory.dtype)
            memory = describe(self.setting.flow, value) or memory
        parts, heads = self._parts(memory), self._heads(memory)
        value = self._reshaped(memory.value, self.setting.of_tokens(memory.value), parts, memory.dtype)
        ordered = tuple(parts[place] for place in memory.order)
        order = memory.order
        if ordered != heads:
            value = self._reshaped(self._transposed(value, order, memory.dtype), ordered, heads, memory.dtype)
            order = tuple(range(4))
        value = self._transposed(value, [order[place] for place in _PARTS], memory.dtype)
        return self._reshaped(value, [heads[place] for place in _PARTS], self._flat(memory), memory.dtype)

    def continue_with(self, rows: ir.Value, memory: CachePoint) -> None:
        """Let whoever read a tensor read these rows in its place, and what makes rows of it fall away."""
        same = (one for one in self._made_into(memory.value) if self._is_by_token(one))
        value = next((one for one in same if self._same_order(memory.value, one)), None)
        if value is None:
            self.editor.replace(memory.value, self._laid_out(rows, memory))
        else:
            made = self._reshaped(rows, self._flat(memory), self.setting.of_tokens(value), memory.dtype)
            self.editor.replace(value, made)

    def _laid_out(self, rows: ir.Value, memory: CachePoint) -> ir.Value:
        """Rows as the tensor lies."""
        parts, heads = self._parts(memory), self._heads(memory)
        ordered = tuple(parts[place] for place in memory.order)
        value = self._reshaped(rows, self._flat(memory), [heads[place] for place in _PARTS], memory.dtype)
        value = self._reshaped(self._transposed(value, _PARTS, memory.dtype), heads, ordered, memory.dtype)
        back = [memory.order.index(place) for place in range(len(parts))]
        value = self._transposed(value, back, memory.dtype)
        return self._reshaped(value, parts, self.setting.of_tokens(memory.value), memory.dtype)

    def _parts(self, memory: CachePoint) -> Sizes:
        return tuple(self.setting.new if size is None else size for size in memory.parts)

    def _heads(self, memory: CachePoint) -> Sizes:
        return memory.batch, memory.heads, self.setting.new, memory.head_dim

    def _flat(self, memory: CachePoint) -> Sizes:
        return memory.batch, self.setting.new, memory.heads * memory.head_dim

    def _reshaped(
        self, value: ir.Value, before: Sequence[Dimension], after: Sequence[Dimension], dtype: ir.DataType
    ) -> ir.Value:
        if tuple(before) == tuple(after):
            return value
        target, name = reshape_target(self.setting.lengths, after, before), f"{value.name}.rows"
        return self.editor.node("Reshape", [value, target], name=name, dtype=dtype, shape=dim_names(after))

    def _transposed(self, value: ir.Value, order: Sequence[int], dtype: ir.DataType) -> ir.Value:
        if list(order) == list(range(len(order))):
            return value
        return self.editor.node("Transpose", [value], {"perm": list(order)}, name=f"{value.name}.moved", dtype=dtype)

    # Other tensors that hold the same rows

    def _made_of(self, value: ir.Value) -> Iterator[ir.Value]:
        node: ir.Node | None
        yield value
        while (node := value.producer()) is not None and self._only_moves(node):
            source = self.setting.before[node][0]
            assert source is not None
            value = source
            yield value

    def _made_into(self, value: ir.Value) -> Iterator[ir.Value]:
        """What a tensor becomes, the last first."""
        found = [value]
        while not value.is_graph_output() and len(users := list(value.uses())) == 1:
            node, index = users[0]
            if index or not self._only_moves(node):
                break
            value = node.outputs[0]
            found.append(value)
        yield from reversed([one for one in found if not one.is_graph_output()])

    def _only_moves(self, node: ir.Node) -> bool:
        return node.op_type in MOVES and node in self.setting.before and self.labels.moves(node)

    def _is_by_token(self, value: ir.Value) -> bool:
        """Whether a tensor is [batch, sequence, ...]."""
        found = describe(self.setting.flow, value)
        if found is None:
            return False
        sequence, batch = found.parts.index(None), found.order[0] if found.batch != 1 else None
        before = enumerate(found.parts[:sequence])
        return (batch is None or batch < sequence) and all(size == 1 or place == batch for place, size in before)

    def _same_order(self, source: ir.Value, value: ir.Value) -> bool:
        try:
            places = self.labels.features(source, value).reshape(-1)
        except UnsupportedError:
            return False
        return np.array_equal(places, np.arange(places.size))
