"""The path from scores to attention weights: scale, softcap, additions, masks and attention sinks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.anatomy.scales import number_of
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.query import is_operator, producer_of
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait

# Operators that change the axes of scores and none of their elements.
MOVES = (Trait.RESHAPE, Trait.TRANSPOSE)
Step = tuple[ir.Node, ir.Value]  # an operator, and the scores that it reads
_ADDITIONS = frozenset({"Add", "Sub", "Where", "Max"})  # `Max` with a constant, as a lower bound of masked scores


@dataclass(frozen=True, kw_only=True)
class ScorePath:
    """The path from scores to the input of softmax.

    Attributes:
        scale: Factor of the scores.
        softcap: Bound of the scores, as `softcap * tanh(scores / softcap)`; 0 if there is none.
        steps: Operators between score product and softmax in execution order; empty for a fused attention operator.
        masked: Scores that become weights, or the mask of a fused attention operator; None if that has no mask.
        sink: Learned scores that a `Concat` adds to those of each query as one more key, which has no value; None if
            there are none.
    """

    scale: float
    softcap: float
    steps: tuple[ir.Node, ...]
    masked: ir.Value | None
    sink: ir.Value | None = None


def constant_factor(flow: TokenFlow, node: ir.Node, value: ir.Value | None) -> float | None:
    """Return the constant that a `Mul` or `Div` multiplies a value with; None if it is no scalar, or 0."""
    if not has_trait(node, Trait.SCALE):
        return None
    index = node.inputs.index(value)
    number = number_of(flow, node.inputs[1 - index])
    if not number or (node.op_type == "Div" and index == 1):
        return None
    return number if node.op_type == "Mul" else 1 / number


def trace_scores(flow: TokenFlow, site: AttentionSite) -> ScorePath:
    """Return the path from scores to softmax of an attention site.

    Raises:
        UnsupportedError: An operator changes scores or weights in a way that no fused attention operator has.
    """
    between = site.upstream_of_weights
    path = list(_walk(flow, site.scores[0].node.outputs[0], between))
    end = next(place for place, (node, value) in enumerate(path) if _normalizes(node, value))
    masked = path[end][1]
    scale, softcap = _read_steps(flow, path[:end])
    sink = _read_sink(flow, path[end:])
    _check_weights(flow, site, path[-1][0], between)
    axes = flow.axes[masked]
    if len(axes) != 2 or not all(axis.is_plain for axis in axes):
        raise UnsupportedError("queries share an axis with heads at the softmax", code=Code.NOT_FUSABLE, at=masked.name)
    steps = tuple(node for node, _ in path[:end])
    return ScorePath(scale=scale, softcap=softcap, steps=steps, masked=masked, sink=sink)


def _walk(flow: TokenFlow, value: ir.Value, between: frozenset[ir.Node]) -> Iterator[Step]:
    """Yield the operators from scores to softmax, each with the scores that it reads."""
    node = None
    while node is None or node.op_type != "Softmax":
        node = _next(flow, value, between)
        yield node, value
        value = node.outputs[0]


def _normalizes(node: ir.Node, value: ir.Value) -> bool:
    """Return whether an operator is the first of those that make weights of scores."""
    return has_trait(node, Trait.SOFTMAX) or node.op_type == "Concat" or _subtracts_maximum(node, value)


def _read_steps(flow: TokenFlow, steps: Sequence[Step]) -> tuple[float, float]:
    """Return scale and softcap of the scores."""
    scale, softcap, added = 1.0, 0.0, False
    for node, value in steps:
        if node.op_type == "Tanh":
            if softcap or added:
                raise _unknown(node, "scores are capped after a mask or bias was added")
            softcap = 1.0
        elif has_trait(node, Trait.SCALE):
            factor = _factor(flow, node, value)
            scale, softcap = scale * factor, softcap * factor
        elif node.op_type in _ADDITIONS:
            _check_addition(flow, node, value)
            added = True
        elif not has_trait(node, *MOVES, Trait.IDENTITY):
            raise _unknown(node, "scores pass an operator that no fused attention operator has")
    return scale, softcap


def _read_sink(flow: TokenFlow, steps: Sequence[Step]) -> ir.Value | None:
    """Return the learned scores that are joined before the softmax; None if there are none."""
    sink = None
    for node, value in steps[:-1]:
        if node.op_type == "Concat" and sink is None:
            others = [one for one in node.inputs if one is not value]
            rows = [axis.learned_rows for axis in flow.axes[node.outputs[0]] if axis.learned_rows]
            if rows != [1] or len(others) != 1:
                raise _unknown(node, "scores are joined with more than one learned score")
            sink = others[0]
        elif not _subtracts_maximum(node, value) and not has_trait(node, *MOVES, Trait.IDENTITY):
            raise _unknown(node, "scores pass an operator that no fused attention operator has")
    return sink


def _subtracts_maximum(node: ir.Node, value: ir.Value) -> bool:
    """Return whether a node is `Sub(x, ReduceMax(x))`, which changes no weight."""
    if not is_operator(node, "Sub") or node.inputs[0] is not value:
        return False
    maximum = producer_of(node.inputs[1], "ReduceMax")
    return maximum is not None and maximum.inputs[0] is value


def _next(flow: TokenFlow, value: ir.Value, between: frozenset[ir.Node]) -> ir.Node:
    """Return the only operator that reads scores; one that reads their shape, or the maximum to subtract, is none."""
    users = {user for user, _ in value.uses() if is_token(flow, user.outputs[0])}
    users = {user for user in users if _subtracts_maximum(user, value)} or users
    found = users & between
    if len(found) != 1 or users != found:
        raise UnsupportedError(
            "scores do not become weights by one softmax", code=Code.NOT_FUSABLE, at=value.name,
            expected="one reader between score product and softmax",
            found=", ".join(sorted(user.op_type for user in users)) or "none",
        )  # fmt: skip
    return found.pop()


def _factor(flow: TokenFlow, node: ir.Node, value: ir.Value) -> float:
    """Return the factor of scores; 1 for a mask of zeros and ones, which the numeric check covers."""
    number = constant_factor(flow, node, value)
    if number is not None:
        return number
    other = node.inputs[1 - node.inputs.index(value)]
    if is_token(flow, other) or node.op_type == "Div":
        raise _unknown(node, "scores are multiplied by a value that is not constant")
    return 1.0


def _check_addition(flow: TokenFlow, node: ir.Node, value: ir.Value) -> None:
    others = [one for one in node.inputs if one is not None and one is not value]
    if any(is_token(flow, one) for one in others):
        raise _unknown(node, "the bias of scores depends on token data")
    if node.op_type == "Sub" and node.inputs[0] is not value:
        raise _unknown(node, "scores are subtracted from a value")


def _check_weights(flow: TokenFlow, site: AttentionSite, softmax: ir.Node, between: frozenset[ir.Node]) -> None:
    """Check that only layout operators, casts and NaN guards are between softmax and context product.

    The weight of a sink is dropped there.
    """
    product = site.products[0]
    value, end = softmax.outputs[0], product.node.inputs[product.weights]
    while value is not end:
        users = [user for user, _ in value.uses() if user in between and is_token(flow, user.outputs[0])]
        guards = [user for user in users if guarded_value(user) is value and _is_zero(flow, user.inputs[1])]
        node = next(iter(guards or users), None)
        if node is None or not (guards or has_trait(node, *MOVES, Trait.IDENTITY) or _drops_sink(flow, node)):
            raise UnsupportedError(
                "attention weights are changed between softmax and context product", code=Code.NOT_FUSABLE,
                at=value.name, found=node.op_type if node is not None else None,
            )  # fmt: skip
        value = node.outputs[0]


def _is_zero(flow: TokenFlow, value: ir.Value | None) -> bool:
    """Return whether all elements of a value are 0, as those of `zeros_like` are."""
    shape = producer_of(value, "ConstantOfShape")
    fill = None if shape is None else shape.attributes.get("value")
    if shape is not None:
        return fill is None or bool((fill.as_tensor().numpy() == 0).all())
    return number_of(flow, value) == 0.0


def _drops_sink(flow: TokenFlow, node: ir.Node) -> bool:
    """Return whether a `Slice` takes the weights of the tokens alone."""
    before, after = (flow.axes.get(value, ()) for value in (node.inputs[0], node.outputs[0]) if value is not None)
    return (
        is_operator(node, "Slice")
        and [axis.without_rows for axis in before] == list(after)
        and all(axis.is_plain for axis in after)
    )


def guarded_value(node: ir.Node) -> ir.Value | None:
    """Return w if a node is a NaN guard `Where(IsNaN(w), ..., w)`, for queries whose keys are all masked; else None."""
    test = producer_of(node.inputs[0], "IsNaN") if is_operator(node, "Where") else None
    return node.inputs[2] if test is not None and test.inputs[0] is node.inputs[2] else None


def _unknown(node: ir.Node, reason: str) -> UnsupportedError:
    return UnsupportedError(reason, code=Code.NOT_FUSABLE, at=node.outputs[0].name, found=node.op_type)
