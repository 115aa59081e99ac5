"""Value numbering: values that are computed in the same way get the same number.

Two values have one number if the same operator with the same attributes computes them from inputs that have one number
each. The numbers of leaves come from a callback, so each use decides what "the same input" means:

    numbering = ValueNumbering()                       # small constants by content, other leaves by identity
    numbering[a] == numbering[b]                       # whether a and b are the same expression
    numbering.representatives(values)                  # common subexpressions: value -> first value of that number

    ValueNumbering(leaf=lambda value: ("scores",) if value in scores else constant_key(value))
    ValueNumbering(operand=lambda node, index: "weight" if is_weight(node.inputs[index]) else None)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import numpy as np
import onnx_ir as ir

from kvsurgeon.graph.constants import constant_tensor, is_weight

# Each evaluation of these gives another result, so no two of them are the same.
NONDETERMINISTIC = ("Random", "Bernoulli", "Multinomial")


class ValueNumbering:
    """Number values by the expression that computes them.

    Instances that share `keys` give comparable numbers, also if their leaves differ.

    Args:
        leaf: Returns a key for a value that is numbered by this key, or None for a value that is numbered by the node
            that computes it (by identity if there is none). Default: the content of small constants.
        operand: Returns a key for the input of a node that replaces the number of the value there, or None. It serves
            inputs that do not matter, such as learned weights.
        source: Returns the value that a value is a copy of, whose number it gets, or None.
        keys: Numbers by key, filled on the way.
    """

    def __init__(
        self,
        leaf: Callable[[ir.Value], Hashable | None] | None = None,
        *,
        operand: Callable[[ir.Node, int], Hashable | None] | None = None,
        source: Callable[[ir.Value], ir.Value | None] | None = None,
        keys: dict[Hashable, int] | None = None,
    ) -> None:
        self._leaf = constant_key if leaf is None else leaf
        self._operand = operand
        self._source = source
        self._keys = {} if keys is None else keys
        self._numbers: dict[ir.Value, int] = {}

    def __getitem__(self, value: ir.Value) -> int:
        """Return the number of a value."""
        pending = [value]
        while pending:
            current = pending[-1]
            if current in self._numbers:
                pending.pop()
                continue
            if self._source is not None and (copied := self._source(current)) is not None:
                if copied in self._numbers:
                    self._numbers[current] = self._numbers[copied]
                else:
                    pending.append(copied)
                continue
            key = self._leaf(current)
            node = current.producer()
            if key is None and node is not None and not node.op_type.startswith(NONDETERMINISTIC):
                missing = self._missing(node)
                if missing:
                    pending += missing
                    continue
                key = self._key(node, current)
            self._numbers[current] = self.number(current if key is None else key)
            pending.pop()
        return self._numbers[value]

    def number(self, key: Hashable) -> int:
        """Return the number of a key."""
        return self._keys.setdefault(key, len(self._keys))

    def representatives(self, values: Iterable[ir.Value]) -> dict[ir.Value, ir.Value]:
        """Return for each value that repeats an earlier one that first value; others are left out."""
        first: dict[int, ir.Value] = {}
        found = {value: first.setdefault(self[value], value) for value in values}
        return {value: original for value, original in found.items() if value is not original}

    def _missing(self, node: ir.Node) -> list[ir.Value]:
        """The inputs of a node that must be numbered before it."""
        return [
            value
            for index, value in enumerate(node.inputs)
            if value is not None and value not in self._numbers and self._operand_key(node, index) is None
        ]

    def _key(self, node: ir.Node, value: ir.Value) -> Hashable:
        inputs: list[Hashable] = []
        for index, source in enumerate(node.inputs):
            operand = None if source is None else self._operand_key(node, index)
            inputs.append(operand if source is None or operand is not None else self._numbers[source])
        return operator_key(node), value.index(), tuple(inputs)

    def _operand_key(self, node: ir.Node, index: int) -> Hashable | None:
        key = None if self._operand is None else self._operand(node, index)
        return None if key is None else ("operand", key)


def operator_key(node: ir.Node) -> Hashable:
    """Return a key of the operator of a node with its attributes, without its inputs."""
    attributes = sorted((name, _attribute_key(attribute)) for name, attribute in node.attributes.items())
    return node.domain, node.op_type, node.overload, tuple(attributes)


def constant_key(value: ir.Value) -> Hashable | None:
    """Return a key of the content of a small constant; None for weights, strings and computed values."""
    tensor = constant_tensor(value)
    if tensor is None or is_weight(tensor) or tensor.dtype is ir.DataType.STRING:
        return None
    return content_key(tensor)


def content_key(tensor: ir.TensorProtocol) -> Hashable | None:
    """Return a key of the type, shape and content of a tensor; None if its file is missing."""
    try:
        array = np.asarray(tensor.numpy())
    except (OSError, ValueError):
        return None
    return str(tensor.dtype), array.shape, array.tobytes()


def _attribute_key(attribute: ir.Attr) -> str:
    """Return a text that is equal for attributes of equal value; large tensors are compared by identity."""
    if attribute.type is not ir.AttributeType.TENSOR:
        return repr(attribute.value)
    tensor = attribute.as_tensor()
    key = None if is_weight(tensor) else content_key(tensor)
    return f"tensor {id(tensor)}" if key is None else repr(key)
