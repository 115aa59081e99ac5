"""The scale and the softcap of attention scores, wherever they are applied between projection and softmax."""

from __future__ import annotations

import math

import onnx_ir as ir

from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.analysis.token_flow import Place, TokenFlow
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait

_STOPS = frozenset({"Softmax", "Where", "Max"})


def read_scale(flow: TokenFlow, site: AttentionSite, query: Place, head_dim: int) -> tuple[float | None, float | None]:
    """Return scale and softcap of an attention; the scale is None if it is not constant."""
    if site.fused is not None:
        attributes = site.fused.node.attributes
        scale = attributes["scale"].as_float() if "scale" in attributes else 1 / math.sqrt(head_dim)
        cap = attributes["softcap"].as_float() if "softcap" in attributes else 0.0
        return scale, cap or None
    score = site.scores[0].node
    below, softcap = _below(flow, score)
    factors = [*(_above(flow, place) for place in (query, site.keys[0].place)), below]
    known = [factor for factor in factors if factor is not None]
    if len(known) < len(factors):
        return None, softcap
    alpha = score.attributes.get_float("alpha", 1.0) if score.op_type == "FusedMatMul" else 1.0
    return math.prod(known) * alpha, softcap


def number_of(flow: TokenFlow, value: ir.Value | None) -> float | None:
    """Return the one number that a value has at every length; None if it has several or is not known."""
    if value is None:
        return None
    numbers = small_constant(value)
    if numbers is not None:
        return float(numbers.reshape(-1)[0]) if numbers.size == 1 else None
    known = flow.shapes[value].value
    if known is None or known.size != 1 or not isinstance(known.reshape(-1)[0], (int, float)):
        return None
    return float(known.reshape(-1)[0])


def _factor(flow: TokenFlow, node: ir.Node) -> float | None:
    """The constant factor by which a `Mul` or `Div` scales token data; 1 for other nodes; None for division by 0."""
    if not has_trait(node, Trait.SCALE) or len(node.inputs) != 2:
        return 1.0
    left, right = (number_of(flow, value) for value in node.inputs)
    if right is not None and is_token(flow, node.inputs[0]):
        return right if node.op_type == "Mul" else 1 / right if right else None
    return left if left is not None and node.op_type == "Mul" else 1.0


def _above(flow: TokenFlow, place: Place) -> float | None:
    """The constant factor between a projection and an operand; of several token inputs the first is followed."""
    node, index = place
    value: ir.Value | None = node.inputs[index]
    product = 1.0
    for _ in range(64):
        producer = None if value is None else value.producer()
        if producer is None or has_trait(producer, Trait.PROJECTION) or producer.op_type.endswith("Normalization"):
            return product
        factor = _factor(flow, producer)
        if factor is None:
            return None
        product *= factor
        value = next((source for source in producer.inputs if is_token(flow, source)), None)
    return product


def _below(flow: TokenFlow, node: ir.Node) -> tuple[float | None, float | None]:
    """The constant factor between the score product and the softmax, and the factor behind a `Tanh`: the softcap."""
    product, softcap = 1.0, None
    for _ in range(32):
        users = [user for user, _ in node.outputs[0].uses()]
        if len(users) != 1 or users[0].op_type in _STOPS:
            break
        node = users[0]
        factor = _factor(flow, node)
        if factor is None:
            return None, softcap
        if node.op_type == "Tanh":
            after = [user for user, _ in node.outputs[0].uses()]
            softcap = _factor(flow, after[0]) if len(after) == 1 else None
        product *= factor
    return product, softcap
