"""Whether two values are made in the same way up to products with weights: the same steps, at the same positions.

Layers that rotate keys by other bases, or not at all, cannot read each other's. Weights may differ, constants that
say how a position is turned may not.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic.dimension import Dimension

# Operators that read learned numbers beside token data, and their inputs that are learned: of others, all constants
# must be the same.
_NORMS = frozenset(
    {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "InstanceNormalization"}
    | {"GroupNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}
)
_QUANTISATION = frozenset({"QuantizeLinear", "DequantizeLinear", "QLinearAdd", "QLinearMul", "QLinearWhere"})


Difference = tuple[ir.Value, ir.Value]


class Likeness:
    """Compares the ways that lead to two values."""

    def __init__(self, analysis: Analysis, first: ir.Value, second: ir.Value) -> None:
        self.flow = analysis.flow
        self.same = analysis.same
        self.ends = first, second
        self.before = self._before(first), self._before(second)
        self._known: dict[Difference, Difference | None] = {}

    def difference(self) -> Difference | None:
        """Return the two values at which the ways from products with weights part; None where they are alike."""
        return self._difference(*self.ends)

    def _before(self, end: ir.Value) -> set[ir.Node]:
        """What leads to the products with weights: a dynamic quantiser's scale is used after them as well."""
        beyond, pending, seen = list[ir.Value](), [end], set[ir.Node]()
        while pending:
            node = pending.pop().producer()
            if node is not None and node not in seen:
                seen.add(node)
                sources = self._token_sources(node)
                (beyond if has_trait(node, Trait.PROJECTION) else pending).extend(sources)
        found = set[ir.Node]()
        while beyond:
            node = beyond.pop().producer()
            if node is not None and node not in found:
                found.add(node)
                beyond += self._token_sources(node)
        return found

    def _token_sources(self, node: ir.Node) -> list[ir.Value]:
        return [value for value in node.inputs if value is not None and self._is_token(value)]

    def _difference(self, first: ir.Value, second: ir.Value) -> Difference | None:
        first, second = itself(first), itself(second)
        key = (self.same.get(first, first), self.same.get(second, second))
        if key not in self._known:
            self._known[key] = None  # a graph has no circles: nothing meets this before it is replaced
            self._known[key] = self._compare(*key)
        return self._known[key]

    def _compare(self, first: ir.Value, second: ir.Value) -> Difference | None:
        if first is second or self._numbers(first) == self._numbers(second) is not None:
            return None
        mine, theirs = first.producer(), second.producer()
        if mine is None or theirs is None or _steps(first) != _steps(second):
            return first, second
        if self._is_token(first) and self._begins(mine, theirs):
            return None
        for index, (one, other) in enumerate(zip(mine.inputs, theirs.inputs, strict=True)):
            if one is None or other is None:
                if one is not other:
                    return first, second
            elif not (self._learned(mine, index, self.before[0]) and self._learned(theirs, index, self.before[1])):
                found = self._difference(one, other)
                if found is not None:
                    return found
        return None

    def _begins(self, mine: ir.Node, theirs: ir.Node) -> bool:
        """Whether two nodes are products with weights, or stand before them."""
        return has_trait(mine, Trait.PROJECTION) or (mine in self.before[0] and theirs in self.before[1])

    def _numbers(self, value: ir.Value) -> Hashable:
        """The numbers of a value that are known before the model runs; None where they are not."""
        tensor = constant_tensor(value)
        if tensor is not None:
            return _content(tensor)
        known = self.flow.shapes.facts.get(value)
        if known is None or known.value is None:
            return None
        return str(known.dtype), known.value.shape, tuple(known.value.reshape(-1))

    def _is_token(self, value: ir.Value) -> bool:
        return self.flow.kinds.get(value) is ValueKind.TOKEN

    def _learned(self, node: ir.Node, index: int, before: set[ir.Node]) -> bool:
        """Whether an input is learned, as a bias or the weight of a norm is, and the same at each position."""
        value, result = node.inputs[index], node.outputs[0]
        if value is None or value in self.flow.kinds or not self._is_token(result):
            return False
        if node.op_type in _NORMS or node.op_type in _QUANTISATION:
            return index > 0
        if all(source.producer() in before for source in self._token_sources(node)):
            return True  # the scale of weights, multiplied with that of what they meet
        shape = self.flow.shapes[value].shape
        if shape is None or all(size == 1 for size in shape):
            return False
        return has_trait(node, Trait.BROADCAST) and not self._varies(shape, result)

    def _varies(self, shape: Sequence[Dimension], result: ir.Value) -> bool:
        """Whether a constant may have other numbers for other positions of the result that it goes into."""
        axes = self.flow.axes.get(result, ())
        if len(axes) != 1:
            return True
        axis = axes[0].axis - len(self.flow.shapes[result].shape or ())
        return -axis <= len(shape) and shape[axis] != 1


def _steps(value: ir.Value) -> Hashable:
    """The operator that makes a value, without what it reads."""
    node = value.producer()
    if node is None:
        return None
    attributes = sorted((name, repr(attribute.value)) for name, attribute in node.attributes.items())
    return node.domain, node.op_type, value.index(), len(node.inputs), tuple(attributes)


def _content(tensor: ir.TensorProtocol) -> Hashable:
    """What a constant holds; None where its file is not there."""
    try:
        array = tensor.numpy()
    except OSError:
        return None
    return str(tensor.dtype), array.shape, array.tobytes()


def itself(value: ir.Value) -> ir.Value:
    """The value that others are another name of: exporters give equal weights one."""
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value
