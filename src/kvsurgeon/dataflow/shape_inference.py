"""Shape inference: facts about every value of a graph, one rule for each operator.

Declared shapes are not trusted, except for their rank if no rule gives one: exporters write wrong ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import onnx_ir as ir

from kvsurgeon.errors import Code, KvsurgeonError, UnsupportedError, reraise_mistake
from kvsurgeon.graph.constants import constant_tensor, is_weight
from kvsurgeon.ops.schema import STANDARD_DOMAINS, by_schema
from kvsurgeon.ops.table import find
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import NOTHING, Fact, OperatorCall, as_stored, known


def raise_at(node: ir.Node, error: Exception) -> NoReturn:
    """Raise the exception of a rule with the node at which it occurred.

    Raises:
        UnsupportedError: In place of any exception that is not an error of this package, and that a model can cause.
    """
    reraise_mistake(error)
    if isinstance(error, KvsurgeonError):
        raise error
    raise UnsupportedError(
        f"{node.op_type}: its inputs are inconsistent", code=Code.INCONSISTENT_SHAPES,
        at=node.outputs[0].name, found=" ".join(str(error).split()) or type(error).__name__,
        hint="does onnxruntime run this model?",
    ) from error  # fmt: skip


@dataclass(slots=True)
class Shapes:
    """Facts about every value of a graph."""

    facts: dict[ir.Value, Fact] = field(default_factory=dict)
    bounds: set[int] = field(default_factory=set)  # the length is assumed to be at most the smallest of these
    opset: int = 0

    def __getitem__(self, value: ir.Value) -> Fact:
        """Return the fact of a value; constants are read when they are first asked for."""
        fact = self.facts.get(value)
        if fact is None:
            fact = self.facts[value] = _fact_of_constant(value)
        return fact

    def call(self, node: ir.Node, inputs: Sequence[ir.Value | None] | None = None) -> OperatorCall:
        """Return a node with the facts of its inputs, or of those that it had before, and of its outputs."""
        inputs = node.inputs if inputs is None else inputs
        facts = tuple([None if value is None else self.facts.get(value) or self[value] for value in inputs])
        results = tuple([self.facts.get(value, NOTHING) for value in node.outputs])
        return OperatorCall(node, facts, self.opset, self.bounds.add, results)


def _fact_of_constant(value: ir.Value) -> Fact:
    tensor = constant_tensor(value)
    if tensor is None:
        return NOTHING
    if is_weight(tensor) or tensor.size > 512 or tensor.dtype is ir.DataType.STRING:
        return Fact(tuple(tensor.shape.numpy()), tensor.dtype)
    return as_stored(known(tensor.numpy(), tensor.dtype))


def infer_shapes(
    nodes: Iterable[ir.Node], inputs: Mapping[ir.Value, tuple[Dimension, ...]], opset: int, *, named: bool = False
) -> Shapes:
    """Return the facts about every value, given the dimensions of the graph inputs.

    Args:
        nodes: In topological order.
        inputs: Dimensions of each graph input.
        opset: Version of the standard operators.
        named: Whether a single integer that is computed from more than shapes gets a symbol, so that the difference
            between it and a sum with it is known.
    """
    shapes = Shapes(opset=opset)
    for value, dimensions in inputs.items():
        fact = Fact(dimensions, value.dtype)
        shapes.facts[value] = _named(value, fact) if named else fact
    for node in nodes:
        if node.op_type == "Constant":
            continue  # looked up when asked for
        call = shapes.call(node)
        operator = find(node.domain, node.op_type, opset if node.domain in STANDARD_DOMAINS else None)
        try:
            found = by_schema(call) if operator is None else operator.shape(call)
        except Exception as error:
            raise_at(node, error)
        outputs = found if isinstance(found, list) else [found]
        for index, value in enumerate(node.outputs):
            fact = outputs[index] if index < len(outputs) else outputs[0]
            fact = as_stored(fact) if fact.shape is not None else _declared(value, fact, call)
            shapes.facts[value] = _named(value, fact) if named else fact
    return shapes


def _named(value: ir.Value, fact: Fact) -> Fact:
    """The fact, with a symbol for a single integer that is not known otherwise."""
    single = fact.shape is not None and all(size == 1 for size in fact.shape)
    if fact.value is not None or not single or fact.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return fact
    return known(np.full(fact.shape or (), dim.symbol(f"number `{value.name}`"), dtype=object), fact.dtype)


def _declared(value: ir.Value, fact: Fact, call: OperatorCall) -> Fact:
    """The declared rank, and the declared dimensions that are numbers, if no rule gives a shape."""
    if value.shape is None:
        return fact
    sizes = tuple(size if isinstance(size, int) else call.unknown() for size in value.shape)
    return Fact(sizes, fact.dtype or value.dtype)
