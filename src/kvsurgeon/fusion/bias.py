"""The attention bias: the operators between scores and softmax, applied to scores of zero."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import zip_longest

import numpy as np
import onnx_ir as ir

from kvsurgeon.fusion.context import FusionContext, Sizes
from kvsurgeon.fusion.match import FusionMatch
from kvsurgeon.fusion.score_path import MOVES
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.sequence_axes import Length

Bias = tuple[ir.Value, Sizes]  # the bias up to an operator, and its shape, which broadcasts to the shape of the scores


class AttentionBias:
    """Creates the bias of attention sites; equal operators are shared between sites."""

    def __init__(self, context: FusionContext) -> None:
        self.context = context
        self.editor = context.editor
        self._nodes: dict[Hashable, ir.Value] = {}

    def of(self, match: FusionMatch) -> ir.Value | None:
        """Return the bias of a site, [batch or 1, heads or 1, S, T]; None if nothing is added to its scores.

        The context slices that nodes between scores and softmax read must be in place.
        """
        bias = self._operator_mask(match)
        source = match.scores
        for node in match.path.steps:
            assert source is not None
            bias = _STEPS.get(node.op_type, AttentionBias._move)(self, node, source, bias)
            source = node.outputs[0]
        if bias is None:
            return None
        value, dtype = self._by_heads(match, bias), match.dtype
        if value.dtype is not dtype:
            value = self._node("Cast", [value], {"to": int(dtype)}, f"{value.name}.cast", dtype)
        # A query without any key must not give NaN, so no element is below half of the type's range.
        minimum = self.editor.constant(float(dtype.min) / 2, dtype.numpy(), name="lowest")
        return self._node("Max", [value, minimum], {}, "bias.of_numbers", dtype)

    def _operator_mask(self, match: FusionMatch) -> Bias | None:
        """Return the mask of an ONNX `Attention` operator as a bias."""
        fused = match.site.fused
        if fused is None or fused.inputs.mask is None:
            return None
        mask, sizes = fused.node.inputs[fused.inputs.mask], self.context.context_sizes(fused.node, fused.inputs.mask)
        original = self.context.before[fused.node][fused.inputs.mask]
        assert mask is not None
        assert original is not None
        if self.context.flow.shapes[original].dtype is not ir.DataType.BOOL:
            return mask, sizes
        zero = self.editor.constant(0, match.dtype.numpy(), name="seen")
        lowest = self.editor.constant(-np.inf, match.dtype.numpy(), name="masked")
        return self._node("Where", [mask, zero, lowest], {}, f"{mask.name}.bias", match.dtype), sizes

    # One operator between scores and softmax

    def _move(self, node: ir.Node, source: ir.Value, bias: Bias | None) -> Bias | None:
        """Apply a layout operator; other operators do not change the bias."""
        if bias is None or not has_trait(node, *MOVES):
            return bias
        whole, _ = self._expand(bias, self.context.token_sizes(source))
        return self._copy(node, [whole, *node.inputs[1:]]), self.context.token_sizes(node.outputs[0])

    def _cast(self, node: ir.Node, source: ir.Value, bias: Bias | None) -> Bias | None:
        return None if bias is None else (self._copy(node, [bias[0]]), bias[1])

    def _add(self, node: ir.Node, source: ir.Value, bias: Bias | None) -> Bias:
        other = 1 - self.context.before[node].index(source)
        given, sizes = node.inputs[other], self.context.context_sizes(node, other)
        assert given is not None
        if bias is not None:
            inputs = [given, bias[0]] if other == 0 else [bias[0], given]
            return self._copy(node, inputs), _broadcast(bias[1], sizes)
        if given.dtype is None:
            given.type = ir.TensorType(self._dtype(node) or ir.DataType.FLOAT)
        if node.op_type == "Sub":
            given = self._node("Neg", [given], {}, f"{given.name}.negative", given.dtype)
        return given, sizes

    def _scale(self, node: ir.Node, source: ir.Value, bias: Bias | None) -> Bias | None:
        """Apply a factor or a lower bound to the bias, if there is one."""
        if bias is None:
            return None
        mine = self.context.before[node].index(source)
        inputs = [bias[0] if place == mine else value for place, value in enumerate(node.inputs)]
        others = [self.context.context_sizes(node, place) for place in range(len(inputs)) if place != mine]
        return self._copy(node, inputs), _broadcast(bias[1], *others)

    def _where(self, node: ir.Node, source: ir.Value, bias: Bias | None) -> Bias:
        """Apply a mask that replaces scores; scores that stay add the bias so far."""
        dtype = self._dtype(node) or ir.DataType.FLOAT
        places = [place for place, value in enumerate(self.context.before[node]) if value is not source]
        inside = bias[0] if bias is not None else self.editor.constant(0, dtype.numpy(), name="nothing_added")
        inputs = [value if place in places else inside for place, value in enumerate(node.inputs)]
        sizes = [self.context.context_sizes(node, place) for place in places]
        return self._copy(node, inputs), _broadcast(*sizes, bias[1] if bias is not None else ())

    # The bias in the layout of the fused operator

    def _by_heads(self, match: FusionMatch, bias: Bias) -> ir.Value:
        """Return the bias as [batch or 1, heads or 1, S, T]."""
        full, order = self._score_layout(match)
        padded = self._reshape(bias, (1,) * (len(full) - len(bias[1])) + bias[1])
        value, sizes = self._cut(self._transpose(padded, order))
        leading, own = tuple(full[place] for place in order[:-2]), sizes[:-2]
        last = (self.context.sequence, self.context.total)
        batch = dim.exact_quotient(dim.product(leading), match.query.heads) or 1
        target: Sizes = (batch, match.query.heads)
        if all(size == 1 for size in own):
            target = (1, 1)
        elif len(leading) == 2:
            target = own
        elif own[0] == batch and all(size == 1 for size in own[1:]):
            target = (batch, 1)
        else:
            own = leading
        return self._reshape(self._expand((value, sizes), (*own, *last)), (*target, *last))[0]

    def _score_layout(self, match: FusionMatch) -> tuple[Sizes, list[int]]:
        """Return the shape of the softmax input, and its axes with those of queries and keys last."""
        context, masked = self.context, match.path.masked
        if masked is None or match.scores is None:
            return (match.query.batch, match.query.heads, context.sequence, context.lengths.total), [0, 1, 2, 3]
        sizes, axes = context.token_sizes(masked), context.flow.axes[masked]
        last = [axis.axis for axis in sorted(axes, key=lambda axis: axis.variable.resolved() is not Length.NEW)]
        return sizes, [*(place for place in range(len(sizes)) if place not in last), *last]

    def _cut(self, bias: Bias) -> Bias:
        """Slice the bias to T columns if context is computed for more."""
        context, (value, sizes) = self.context, bias
        if context.lengths.total == context.total or sizes[-1] == 1:
            return bias
        bounds = [context.lengths.vector(one) for one in ([0], [context.total], [len(sizes) - 1])]
        cut = self._node("Slice", [value, *bounds], {}, "bias.so_far", value.dtype)
        return cut, (*sizes[:-1], context.total)

    def _transpose(self, bias: Bias, order: Sequence[int]) -> Bias:
        value, sizes = bias
        if list(order) == list(range(len(order))):
            return bias
        moved = self._node("Transpose", [value], {"perm": list(order)}, "bias.ordered", value.dtype)
        return moved, tuple(sizes[place] for place in order)

    def _expand(self, bias: Bias, sizes: Sizes) -> Bias:
        return self._resize("Expand", bias, sizes, "bias.full")

    def _reshape(self, bias: Bias, sizes: Sizes) -> Bias:
        return self._resize("Reshape", bias, sizes, "bias.axes")

    def _resize(self, operator: str, bias: Bias, sizes: Sizes, name: str) -> Bias:
        value, before = bias
        if before == sizes:
            return bias
        return self._node(operator, [value, self.context.lengths.vector(sizes)], {}, name, value.dtype), sizes

    def _copy(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Value:
        """Return the output of a node's operator for other inputs."""
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        return self._node(node.op_type, inputs, attributes, f"{node.outputs[0].name}.bias", self._dtype(node))

    def _node(
        self, operator: str, inputs: Sequence[ir.Value | None], attributes: dict[str, object], name: str,
        dtype: ir.DataType | None,
    ) -> ir.Value:  # fmt: skip
        """Return the output of a node, one for equal inputs and attributes."""
        key = operator, tuple(inputs), repr(sorted(attributes.items()))
        if key not in self._nodes:
            self._nodes[key] = self.editor.node(operator, inputs, attributes, name=name, dtype=dtype)
        return self._nodes[key]

    def _dtype(self, node: ir.Node) -> ir.DataType | None:
        return self.context.flow.shapes[node.outputs[0]].dtype


def _broadcast(*shapes: Sizes) -> Sizes:
    columns = zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1)
    return tuple(next((size for size in reversed(column) if size != 1), 1) for column in columns)[::-1]


_STEPS: dict[str, Callable[[AttentionBias, ir.Node, ir.Value, Bias | None], Bias | None]] = {
    "Cast": AttentionBias._cast, "Add": AttentionBias._add, "Sub": AttentionBias._add, "Where": AttentionBias._where,
    "Mul": AttentionBias._scale, "Div": AttentionBias._scale, "Max": AttentionBias._scale,
}  # fmt: skip
