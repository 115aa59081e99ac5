"""Products in which several query heads meet one key head, done for other groups of them.

`[batch, kv_heads, group * length, head_dim] @ [batch, kv_heads, head_dim, length]` is one product for a whole group.
With other key heads the groups are others; what goes in and what comes out stays where its neighbours expect it.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from kvsurgeon.analysis.token_flow import Place, TokenFlow
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.heads.arrange import Arrange
from kvsurgeon.heads.layout import Logical
from kvsurgeon.heads.shared_heads import Part, contraction_at, parts_met
from kvsurgeon.ops.contraction import Contraction
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension

_ORDER = ("batch", "shared", "own", "tokens", "width")


class Regrouping:
    """Does products anew for other groups of query heads."""

    def __init__(self, flow: TokenFlow, editor: Editor, arrange: Arrange) -> None:
        self.flow = flow
        self.editor = editor
        self.arrange = arrange

    def wanted(self, place: Place, axes: Logical) -> Logical:
        """The order in which a product that is done anew reads keys or values."""
        sizes = dict(axes)
        if not any(part.word == "batch" for parts in parts_met(self.flow, place) for part in parts):
            sizes.pop("batch", None)  # fixed to 1, and no axis of the queries
        last = ("sequence", "head_dim") if self._sums_tokens(place) else ("head_dim", "sequence")
        return tuple((word, sizes[word]) for word in ("batch", "heads", *last) if word in sizes)

    def regroup(self, place: Place, keys: ir.Value, kv_heads: int, heads: int) -> None:
        """Let `keys`, in the order of `wanted`, meet the queries that the product at `place` has now.

        Raises:
            UnsupportedError: The product cannot be done so.
        """
        node, index = place
        found = contraction_at(self.flow, node)
        other = found.left if index == found.right else found.right
        value = node.inputs[other]
        assert value is not None
        mine = parts_met(self.flow, place)
        flat = [part for parts in mine for part in parts]
        if dim.product(part.size for part in flat if part.word in ("shared", "own")) != heads:
            raise UnsupportedError("query heads cannot be told from what lies beside them", at=node.outputs[0].name)
        order = sorted(range(len(flat)), key=lambda at: _ORDER.index(flat[at].word))
        queries = self._grouped(value, [part.size for part in flat], order, flat, kv_heads, heads)
        result = self._product(place, found, queries, keys)
        self._give_back(place, found, mine, result, kv_heads, heads)

    def _sums_tokens(self, place: Place) -> bool:
        """Whether the product sums tokens, as that with the values does."""
        node, index = place
        found = contraction_at(self.flow, node)
        labels = found.left_labels if index == found.left else found.right_labels
        value = node.inputs[index]
        assert value is not None
        return any(labels[axis.axis] in found.summed for axis in self.flow.axes.get(value, ()))

    def _group_sizes(self, flat: Sequence[Part], kv_heads: int, heads: int, width: Dimension) -> list[Dimension]:
        """[batch, kv_heads, group * length, width]."""
        batch = [part.size for part in flat if part.word == "batch"]
        return [*batch, kv_heads, dim.multiply(self.flow.length, heads // kv_heads), width]

    def _grouped(
        self, value: ir.Value, sizes: list[Dimension], order: list[int], flat: Sequence[Part], kv_heads: int, heads: int
    ) -> ir.Value:
        dtype = value.dtype
        value = self.arrange.reshaped(value, self.flow.shapes[value].shape or (), sizes, dtype)
        value = self.arrange.transposed(value, order, dtype)
        width = next(part.size for part in flat if part.word == "width")
        after = self._group_sizes(flat, kv_heads, heads, width)
        return self.arrange.reshaped(value, [sizes[at] for at in order], after, dtype)

    def _product(self, place: Place, found: Contraction, queries: ir.Value, keys: ir.Value) -> ir.Value:
        node, index = place
        name = f"{node.outputs[0].name}.regrouped"
        if node.op_type in ("MatMul", "Einsum"):
            return self.editor.node("MatMul", [queries, keys], name=name, dtype=node.outputs[0].dtype)
        if index == found.left or node.op_type == "Gemm":
            raise UnsupportedError(
                f"{node.op_type}: it cannot be done for other groups of heads", at=node.outputs[0].name
            )
        inputs = list(node.inputs)
        inputs[found.left], inputs[found.right] = queries, keys
        return self.editor.copy(node, inputs, "regrouped", frozenset({"transA", "transB"})).outputs[0]

    def _give_back(
        self, place: Place, found: Contraction, mine: list[list[Part]], result: ir.Value, kv_heads: int, heads: int
    ) -> None:
        """Bring the result into the axes in which its readers expect it."""
        node, index = place
        output = node.outputs[0]
        shape = self.flow.shapes[output].shape or ()
        labels = found.left_labels if index == found.right else found.right_labels
        axes = [
            mine[labels.index(label)] if label in labels else [Part(word="width", size=shape[axis])]
            for axis, label in enumerate(found.result_labels)
        ]
        flat = [part for parts in axes for part in parts]
        order = sorted(range(len(flat)), key=lambda at: _ORDER.index(flat[at].word))
        width = next(part.size for part in flat if part.word == "width")
        apart = [flat[at].size for at in order]
        value = self.arrange.reshaped(result, self._group_sizes(flat, kv_heads, heads, width), apart, output.dtype)
        back = [order.index(at) for at in range(len(flat))]
        value = self.arrange.transposed(value, back, output.dtype)
        value = self.arrange.reshaped(value, [part.size for part in flat], shape, output.dtype)
        for user, at in tuple(output.uses()):
            self.editor.replace_input(user, at, value)
