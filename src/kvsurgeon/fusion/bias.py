"""What is added to scores, taken out of the graph: the operators between scores and softmax, run on zero."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import onnx_ir as ir

from kvsurgeon.fusion.context import Setting, Sizes
from kvsurgeon.fusion.match import Fusable
from kvsurgeon.fusion.score_path import MOVES
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.sequence_axes import Length


@dataclass(frozen=True, kw_only=True)
class Sum:
    """What was added so far, and its sizes, which may be fewer or smaller than those of the scores."""

    value: ir.Value
    sizes: Sizes


class Biases:
    """Makes the bias of attentions; what several of them add is made once."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.editor = setting.editor
        self._made: dict[Hashable, ir.Value] = {}

    def of(self, fusable: Fusable) -> ir.Value | None:
        """Return the bias, [batch or 1, heads or 1, new tokens, tokens so far]; None where nothing is added.

        Nodes between scores and softmax must read context at the lengths that it is to have.
        """
        added = self._of_operator(fusable)
        source = fusable.scores
        for node in fusable.steps:
            assert source is not None
            added = _STEPS.get(node.op_type, _move)(self, node, source, added)
            source = node.outputs[0]
        if added is None:
            return None
        whole = self._cast(self._for_heads(self._cut(self._ordered(added, fusable)), fusable), fusable.dtype)
        return self._of_numbers(whole, fusable.dtype)

    def _of_numbers(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Nothing below half of the type's range: a query that sees no key then gives numbers, which nobody reads."""
        lowest = self.editor.constant(float(dtype.min) / 2, dtype.numpy(), name="lowest")
        return self.made("Max", [value, lowest], {}, "bias.of_numbers", dtype)

    def _of_operator(self, fusable: Fusable) -> Sum | None:
        """What one operator is given as its mask."""
        fused = fusable.head.fused
        if fused is None or fused.mask is None:
            return None
        mask, sizes = fused.node.inputs[fused.mask], self.setting.of_context(fused.node, fused.mask)
        original = self.setting.before[fused.node][fused.mask]
        assert mask is not None
        assert original is not None
        if self.setting.flow.shapes[original].dtype is not ir.DataType.BOOL:
            return Sum(value=mask, sizes=sizes)
        numpy = fusable.dtype.numpy()
        inputs = [
            mask,
            self.editor.constant(0, numpy, name="seen"),
            self.editor.constant(-np.inf, numpy, name="masked"),
        ]
        return Sum(value=self.made("Where", inputs, {}, f"{mask.name}.bias", fusable.dtype), sizes=sizes)

    def twin(self, node: ir.Node, inputs: Sequence[ir.Value | None], name: str | None = None) -> ir.Value:
        """The result of a node's operator on other inputs."""
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        return self.made(node.op_type, inputs, attributes, name or f"{node.outputs[0].name}.bias", self.dtype_of(node))

    def made(
        self, operator: str, inputs: Sequence[ir.Value | None], attributes: dict[str, object], name: str,
        dtype: ir.DataType | None,
    ) -> ir.Value:  # fmt: skip
        """An operator's result, made once for the same inputs."""
        key = operator, tuple(inputs), repr(sorted(attributes.items()))
        if key not in self._made:
            self._made[key] = self.editor.node(operator, inputs, attributes, name=name, dtype=dtype)
        return self._made[key]

    def dtype_of(self, node: ir.Node) -> ir.DataType | None:
        """The type of a node's result."""
        return self.setting.flow.shapes[node.outputs[0]].dtype

    def expanded(self, added: Sum, sizes: Sizes) -> Sum:
        """The sum in full size."""
        if added.sizes == sizes:
            return added
        inputs = [added.value, self.setting.lengths.vector(sizes)]
        return Sum(value=self.made("Expand", inputs, {}, "bias.full", added.value.dtype), sizes=sizes)

    def _reshaped(self, added: Sum, sizes: Sizes) -> Sum:
        if added.sizes == sizes:
            return added
        inputs = [added.value, self.setting.lengths.vector(sizes)]
        return Sum(value=self.made("Reshape", inputs, {}, "bias.axes", added.value.dtype), sizes=sizes)

    def _ordered(self, added: Sum, fusable: Fusable) -> Sum:
        """The sum with as many axes as the scores have, those of queries and keys last."""
        full, order = self._full(fusable), self._order(fusable)
        added = self._reshaped(added, (1,) * (len(full) - len(added.sizes)) + added.sizes)
        if order == list(range(len(full))):
            return added
        value = self.made("Transpose", [added.value], {"perm": order}, "bias.ordered", added.value.dtype)
        return Sum(value=value, sizes=tuple(added.sizes[place] for place in order))

    def _order(self, fusable: Fusable) -> list[int]:
        if fusable.masked is None or fusable.scores is None:
            return [0, 1, 2, 3]
        axes = self.setting.flow.axes[fusable.masked]
        last = [axis.axis for axis in sorted(axes, key=lambda axis: axis.role.resolved() is not Length.NEW)]
        return [*(place for place in range(len(self._full(fusable))) if place not in last), *last]

    def _full(self, fusable: Fusable) -> Sizes:
        """The sizes of what enters the softmax."""
        if fusable.masked is None or fusable.scores is None:
            return fusable.query.batch, fusable.query.heads, self.setting.new, self.setting.lengths.total
        return self.setting.of_tokens(fusable.masked)

    def _cut(self, added: Sum) -> Sum:
        """The columns of the tokens so far, where context is computed for more."""
        setting = self.setting
        if setting.lengths.total == setting.so_far or added.sizes[-1] == 1:
            return added
        bounds = [setting.lengths.vector(one) for one in ([0], [setting.so_far], [len(added.sizes) - 1])]
        value = self.made("Slice", [added.value, *bounds], {}, "bias.so_far", added.value.dtype)
        return Sum(value=value, sizes=(*added.sizes[:-1], setting.so_far))

    def _for_heads(self, added: Sum, fusable: Fusable) -> ir.Value:
        """The sum as the operator wants it: its batch and its heads may be 1, queries and keys may not."""
        full = self._full(fusable)
        leading = tuple(full[place] for place in self._order(fusable)[:-2])
        last = (self.setting.new, self.setting.so_far)
        heads = fusable.query.heads
        batch = dim.exact_quotient(dim.product(leading), heads) or 1
        mine = added.sizes[:-2]
        if all(size == 1 for size in mine):
            added = self.expanded(added, (*mine, *last))
            return self._reshaped(added, (1, 1, *last)).value
        if len(leading) == 2:
            return self.expanded(added, (*mine, *last)).value
        if mine[0] == batch and all(size == 1 for size in mine[1:]):
            added = self.expanded(added, (*mine, *last))
            return self._reshaped(added, (batch, 1, *last)).value
        added = self.expanded(added, (*leading, *last))
        return self._reshaped(added, (batch, heads, *last)).value

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value.dtype is dtype:
            return value
        return self.made("Cast", [value], {"to": int(dtype)}, f"{value.name}.cast", dtype)


def _broadcast(*sizes: Sizes) -> Sizes:
    def two(one: Sizes, other: Sizes) -> Sizes:
        rank = max(len(one), len(other))
        padded = ((1,) * (rank - len(size)) + size for size in (one, other))
        return tuple(mine if theirs == 1 else theirs for mine, theirs in zip(*padded, strict=True))

    return reduce(two, sizes)


def _move(biases: Biases, node: ir.Node, source: ir.Value, added: Sum | None) -> Sum | None:
    """What changes no number: axes that are moved, and nothing at all."""
    if added is None or node.op_type not in MOVES:
        return added
    whole = biases.expanded(added, biases.setting.of_tokens(source))
    value = biases.twin(node, [whole.value, *node.inputs[1:]])
    return Sum(value=value, sizes=biases.setting.of_tokens(node.outputs[0]))


def _cast(biases: Biases, node: ir.Node, source: ir.Value, added: Sum | None) -> Sum | None:
    return None if added is None else Sum(value=biases.twin(node, [added.value]), sizes=added.sizes)


def _plus(biases: Biases, node: ir.Node, source: ir.Value, added: Sum | None) -> Sum | None:
    other = 1 - biases.setting.before[node].index(source)
    given, sizes = node.inputs[other], biases.setting.of_context(node, other)
    assert given is not None
    if added is not None:
        inputs = [given, added.value] if other == 0 else [added.value, given]
        return Sum(value=biases.twin(node, inputs), sizes=_broadcast(added.sizes, sizes))
    if given.dtype is None:
        given.type = ir.TensorType(biases.dtype_of(node) or ir.DataType.FLOAT)
    if node.op_type == "Sub":
        given = biases.made("Neg", [given], {}, f"{given.name}.negative", given.dtype)
    return Sum(value=given, sizes=sizes)


def _with_others(biases: Biases, node: ir.Node, source: ir.Value, added: Sum | None) -> Sum | None:
    """What is multiplied, or kept above a number, after something was added: the same is done to the sum."""
    if added is None:
        return None
    mine = biases.setting.before[node].index(source)
    inputs = [added.value if place == mine else value for place, value in enumerate(node.inputs)]
    others = [biases.setting.of_context(node, place) for place in range(len(inputs)) if place != mine]
    return Sum(value=biases.twin(node, inputs), sizes=_broadcast(added.sizes, *others))


def _where(biases: Biases, node: ir.Node, source: ir.Value, added: Sum | None) -> Sum | None:
    """A mask that replaces scores: what is not masked adds what was added before, or nothing."""
    dtype = biases.dtype_of(node) or ir.DataType.FLOAT
    places = [place for place, value in enumerate(biases.setting.before[node]) if value is not source]
    inside = added.value if added is not None else biases.editor.constant(0, dtype.numpy(), name="nothing_added")
    inputs = [value if place in places else inside for place, value in enumerate(node.inputs)]
    sizes = [biases.setting.of_context(node, place) for place in places]
    return Sum(value=biases.twin(node, inputs), sizes=_broadcast(*sizes, added.sizes if added is not None else ()))


_STEPS: dict[str, Callable[[Biases, ir.Node, ir.Value, Sum | None], Sum | None]] = {
    "Cast": _cast, "Mul": _with_others, "Div": _with_others, "Max": _with_others,
    "Add": _plus, "Sub": _plus, "Where": _where,
}  # fmt: skip
