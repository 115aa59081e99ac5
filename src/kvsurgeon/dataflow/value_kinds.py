"""Three kinds of value: constants, context, and token data.

Context depends on the inputs only through shapes and through what is given for all tokens so far, such as an
attention mask: it can be computed at any length. Token data depends on what is given for the new tokens alone, and must
be cached. Fixed context is made of inputs without tokens, such as an encoder's output: it is the same in every call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum

import onnx_ir as ir
import sympy

from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.graph.query import all_inputs
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import operator_of
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import LENGTH


class ValueKind(IntEnum):
    """The kind of a value, in rising order: a result has the highest kind among its inputs."""

    CONSTANT = 0
    CONTEXT = 1
    TOKEN = 2


def classify_values(nodes: Iterable[ir.Node], inputs: list[InputRole], shapes: Shapes) -> dict[ir.Value, ValueKind]:
    """Return the kind of every value that is not constant."""
    kinds: dict[ir.Value, ValueKind] = {
        given.value: ValueKind.TOKEN if given.is_token else ValueKind.CONTEXT for given in inputs
    }
    for node in nodes:
        operator = operator_of(node)
        read = all_inputs(node)
        if operator is not None and operator.type_only:
            read = [value for index, value in enumerate(node.inputs) if value and index not in operator.type_only]
        kind = max((kinds.get(value, ValueKind.CONSTANT) for value in read), default=ValueKind.CONSTANT)
        fact = shapes.facts.get(node.outputs[0])
        known = fact is not None and fact.value is not None  # numbers that do not depend on the tokens
        if kind is ValueKind.TOKEN and (known or (operator is not None and Trait.SHAPE_ONLY in operator.traits)):
            kind = ValueKind.CONTEXT
        if kind is not ValueKind.CONSTANT:
            kinds |= dict.fromkeys(node.outputs, kind)
    return kinds


def find_fixed_values(
    nodes: Iterable[ir.Node], inputs: list[InputRole], shapes: Shapes, kinds: Mapping[ir.Value, ValueKind]
) -> dict[ir.Value, frozenset[ir.Value]]:
    """Return the context that is the same in every call, each with the inputs whose content it is computed from."""
    fixed = {given.value: frozenset([given.value]) for given in inputs if not given.lengths}
    for node in nodes:
        if kinds.get(node.outputs[0]) is not ValueKind.CONTEXT:
            continue
        read = [value for value in all_inputs(node) if kinds.get(value, ValueKind.CONSTANT) is not ValueKind.CONSTANT]
        is_fixed = all(value in fixed for value in read)
        origins = frozenset().union(*(fixed.get(value, ()) for value in content_inputs(node)))
        for value in node.outputs:
            fact = shapes.facts.get(value)
            if fact is not None and fact.value is not None:
                if not any(map(_depends_on_length, fact.value.reshape(-1))):
                    fixed[value] = frozenset()
            elif is_fixed:
                fixed[value] = origins
    return fixed


def _depends_on_length(number: object) -> bool:
    return isinstance(number, sympy.Expr) and (LENGTH in number.free_symbols or not dim.is_known(number))
