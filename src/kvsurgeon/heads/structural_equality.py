"""Structural equality of two values up to their weights: the same nodes between projection and value.

Layers whose keys are rotated with other frequencies, or not at all, cannot share keys. Weights may differ; position
constants may not.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.token_data import is_token, token_inputs, upstream_tokens
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.query import producers, through, upstream
from kvsurgeon.graph.value_numbering import content_key, operator_key
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait


def find_difference(analysis: Analysis, first: ir.Value, second: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Return the nearest values upstream that different operators or constants compute; None if there are none."""
    flow = analysis.flow
    before = [_before_projections(flow, value) for value in (first, second)]
    pending = [(first, second)]
    compared: set[tuple[ir.Value, ...]] = set()
    while pending:
        values = [through(value, {"Identity"}) for value in pending.pop()]
        one, other = pair = tuple(analysis.same.get(value, value) for value in values)
        if pair in compared or one is other or _constant_key(flow, one) == _constant_key(flow, other) is not None:
            continue
        compared.add(pair)
        mine, theirs = one.producer(), other.producer()
        if mine is None or theirs is None or expression_key(mine, one) != expression_key(theirs, other):
            return one, other
        projected = has_trait(mine, Trait.PROJECTION) or (mine in before[0] and theirs in before[1])
        if projected and is_token(flow, one):
            continue
        for index in reversed(range(len(mine.inputs))):  # the first input is compared first
            left, right = mine.inputs[index], theirs.inputs[index]
            if left is None or right is None:
                if left is not right:
                    return one, other
            elif not (_is_learned(flow, mine, index, before[0]) and _is_learned(flow, theirs, index, before[1])):
                pending.append((left, right))
    return None


def _before_projections(flow: TokenFlow, value: ir.Value) -> set[ir.Node]:
    """The nodes upstream of a value's projections: a dynamic quantization scale is also used after them."""
    projections = [node for node in producers(upstream_tokens(flow, value)) if has_trait(node, Trait.PROJECTION)]
    sources = [source for node in projections for source in token_inputs(flow, node)]
    return set(producers(upstream(sources, inputs=partial(token_inputs, flow))))


def expression_key(node: ir.Node, value: ir.Value) -> Hashable:
    """Return a key of the operator that computes a value, without what it is computed from."""
    return operator_key(node), value.index(), len(node.inputs)


def _constant_key(flow: TokenFlow, value: ir.Value) -> Hashable | None:
    """A key of a value's content if it is known before the model runs."""
    tensor = constant_tensor(value)
    if tensor is not None:
        return content_key(tensor)
    known = flow.shapes.facts.get(value)
    if known is None or known.value is None:
        return None
    return str(known.dtype), known.value.shape, tuple(known.value.reshape(-1))


def _is_learned(flow: TokenFlow, node: ir.Node, index: int, before: set[ir.Node]) -> bool:
    """Whether an input is a learned parameter, such as a bias or the weight of a norm, equal for all positions."""
    value, result = node.inputs[index], node.outputs[0]
    if value is None or value in flow.kinds or not is_token(flow, result):
        return False
    if has_trait(node, Trait.NORMALIZATION, Trait.QUANTIZATION):
        return index > 0
    if all(source.producer() in before for source in token_inputs(flow, node)):
        return True  # the scale of weights, multiplied by the dynamic scale of their operand
    shape = flow.shapes[value].shape
    if shape is None or all(size == 1 for size in shape) or not has_trait(node, Trait.BROADCAST):
        return False
    axes = flow.axes.get(result, ())
    if len(axes) != 1:
        return False
    axis = axes[0].axis - len(flow.shapes[result].shape or ())
    return -axis > len(shape) or shape[axis] == 1
