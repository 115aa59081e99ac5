"""The way from scores to weights: what they are multiplied with, capped at, added to, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.analysis.analysis import AttentionSite
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.anatomy.scales import number_of
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError

# Operators through which scores go without being changed, though their axes may.
MOVES = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten"})
_SAME = frozenset({"Identity", "Cast", "Dropout"})
_ADDING = frozenset({"Add", "Sub", "Where", "Max"})  # of `Max`, a number below which no score lies


@dataclass(frozen=True, kw_only=True)
class Way:
    """From scores to what enters the softmax.

    Attributes:
        scale: What scores are multiplied with.
        softcap: What they are capped at by a tangent; 0 where they are not.
        steps: The operators on the way.
        masked: Its end.
    """

    scale: float
    softcap: float
    steps: tuple[ir.Node, ...]
    masked: ir.Value


def is_token(flow: TokenFlow, value: ir.Value | None) -> bool:
    """Whether a value is token data."""
    return value is not None and flow.kinds.get(value) is ValueKind.TOKEN


def number_beside(flow: TokenFlow, node: ir.Node, value: ir.Value | None) -> float | None:
    """Return the number that a `Mul` or `Div` multiplies a value with; None where it is no single one, or 0."""
    if node.op_type not in ("Mul", "Div"):
        return None
    index = node.inputs.index(value)
    number = number_of(flow, node.inputs[1 - index])
    if not number or (node.op_type == "Div" and index == 1):
        return None
    return number if node.op_type == "Mul" else 1 / number


def find_way(flow: TokenFlow, head: AttentionSite) -> Way:
    """Return the way that the scores of an attention take.

    Raises:
        UnsupportedError: They are changed in another way, or the weights are.
    """
    return _Walk(flow, head).find()


class _Walk:
    """One way, operator by operator."""

    def __init__(self, flow: TokenFlow, head: AttentionSite) -> None:
        self.flow = flow
        self.head = head

    def find(self) -> Way:
        """Go down to the softmax, and look at what follows it."""
        value: ir.Value = self.head.scores[0].node.outputs[0]
        steps: list[ir.Node] = []
        scale, softcap = 1.0, 0.0
        between = self.head.upstream_of_weights()
        while (node := self._next(value, between)).op_type != "Softmax":
            if node.op_type == "Tanh":
                if softcap or self._adds(steps):
                    raise self._unknown(node, "scores are capped after something was added to them")
                softcap = 1.0
            elif node.op_type in ("Mul", "Div"):
                factor = self._factor(node, value)
                scale, softcap = scale * factor, softcap * factor
            elif node.op_type in _ADDING:
                self._check_plus(node, value)
            elif node.op_type not in MOVES | _SAME:
                raise self._unknown(node, "scores are changed in a way that no fused operator knows")
            steps.append(node)
            value = node.outputs[0]
        self._check_weights(node, between)
        self._check_axes(value)
        return Way(scale=scale, softcap=softcap, steps=tuple(steps), masked=value)

    def _check_axes(self, masked: ir.Value) -> None:
        """Queries and keys each have an axis of their own at the softmax."""
        axes = self.flow.axes[masked]
        if len(axes) != 2 or not all(axis.is_plain for axis in axes):
            raise UnsupportedError("queries share an axis with heads at the softmax", at=masked.name)

    def _adds(self, steps: Sequence[ir.Node]) -> bool:
        return any(step.op_type in _ADDING for step in steps)

    def _next(self, value: ir.Value, between: frozenset[ir.Node]) -> ir.Node:
        """The one operator that makes weights of a value; what only asks for its shape does not count."""
        users = {user for user, _ in value.uses() if is_token(self.flow, user.outputs[0])}
        found = users & between
        if len(found) != 1 or users != found:
            raise UnsupportedError(
                "weights are not made of scores by one softmax", at=value.name, expected="one reader on the way to it",
                found=", ".join(sorted(user.op_type for user in users)) or "none",
            )  # fmt: skip
        return found.pop()

    def _factor(self, node: ir.Node, value: ir.Value) -> float:
        """The number that scores are multiplied with; 1 for a mask of zeros and ones, as running it must show."""
        number = number_beside(self.flow, node, value)
        if number is not None:
            return number
        other = node.inputs[1 - node.inputs.index(value)]
        if is_token(self.flow, other) or node.op_type == "Div":
            raise self._unknown(node, "scores are multiplied with something that is not constant")
        return 1.0

    def _check_plus(self, node: ir.Node, value: ir.Value) -> None:
        others = [one for one in node.inputs if one is not None and one is not value]
        if any(is_token(self.flow, one) for one in others):
            raise self._unknown(node, "what is added to scores depends on the tokens")
        if node.op_type == "Sub" and node.inputs[0] is not value:
            raise self._unknown(node, "scores are subtracted from something")

    def _check_weights(self, softmax: ir.Node, between: frozenset[ir.Node]) -> None:
        """Between softmax and context product weights may be moved, cast, and rid of what is not a number."""
        product = self.head.products[0]
        value, end = softmax.outputs[0], product.node.inputs[product.weights]
        while value is not end:
            users = [user for user, _ in value.uses() if user in between and is_token(self.flow, user.outputs[0])]
            guards = [user for user in users if user.op_type == "Where" and self._is_guard(user, value)]
            node = guards[0] if guards else users[0] if users else None
            known = node is not None and (node.op_type in MOVES | _SAME or bool(guards))
            if node is None or not known:
                raise UnsupportedError(
                    "weights are changed between softmax and values", at=value.name,
                    found=node.op_type if node is not None else None,
                )  # fmt: skip
            value = node.outputs[0]

    def _is_guard(self, node: ir.Node, weights: ir.Value) -> bool:
        """Where(IsNaN(weights), 0, weights): a query that sees no key."""
        condition, zero, otherwise = node.inputs[:3]
        test = None if condition is None else condition.producer()
        is_test = test is not None and test.op_type == "IsNaN" and test.inputs[0] is weights
        return is_test and otherwise is weights and number_of(self.flow, zero) == 0.0

    def _unknown(self, node: ir.Node, reason: str) -> UnsupportedError:
        return UnsupportedError(reason, at=node.outputs[0].name, found=node.op_type)
