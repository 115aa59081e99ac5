"""The number that scores are multiplied with, wherever on the way from projection to softmax it stands."""

from __future__ import annotations

import math

import onnx_ir as ir

from kvsurgeon.analysis.analysis import AttentionSite
from kvsurgeon.analysis.cache_points import PROJECTIONS
from kvsurgeon.analysis.token_flow import Place, TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.graph.constants import small_constant

_STOPS = frozenset({"Softmax", "Where", "Max"})


def read_scale(flow: TokenFlow, head: AttentionSite, query: Place, head_dim: int) -> tuple[float | None, float | None]:
    """Return scale and softcap; the scale is None where it is not made of constants."""
    if head.fused is not None:
        attributes = head.fused.node.attributes
        stated = float(attributes["scale"].value) if "scale" in attributes else 1 / math.sqrt(head_dim)
        cap = float(attributes["softcap"].value) if "softcap" in attributes else 0.0
        return stated, cap or None
    above = [_above(flow, place) for place in (query, head.keys[0].place)]
    below, softcap = _below(flow, head.scores[0].node)
    factors = [*above, below]
    alpha = head.scores[0].node.attributes.get("alpha")
    known = [factor for factor in factors if factor is not None]
    if len(known) < len(factors):
        return None, softcap
    fused = alpha is not None and head.scores[0].node.op_type == "FusedMatMul"
    return math.prod(known) * (float(alpha.value) if fused and alpha is not None else 1.0), softcap


def _factor(flow: TokenFlow, node: ir.Node) -> float | None:
    """The constant that a `Mul` or `Div` multiplies token data with; 1 for anything else."""
    if node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
        return 1.0
    constants = [number_of(flow, value) for value in node.inputs]
    if constants[1] is not None and flow.kinds.get(node.inputs[0]) is ValueKind.TOKEN:  # type: ignore[arg-type]
        return constants[1] if node.op_type == "Mul" else 1 / constants[1] if constants[1] else None
    if constants[0] is not None and node.op_type == "Mul":
        return constants[0]
    return 1.0


def number_of(flow: TokenFlow, value: ir.Value | None) -> float | None:
    """Return the one number that a value holds at any length; None where it is another or not known."""
    if value is None:
        return None
    constant = small_constant(value)
    if constant is None:
        known = flow.shapes[value].value
        if known is None or known.size != 1 or not isinstance(known.reshape(-1)[0], (int, float)):
            return None
        return float(known.reshape(-1)[0])
    return float(constant.reshape(-1)[0]) if constant.size == 1 else None


def _above(flow: TokenFlow, place: Place) -> float | None:
    """The constants between a projection and a product; along the first token input where several meet."""
    node, index = place
    value = node.inputs[index]
    product = 1.0
    for _ in range(64):
        maker = None if value is None else value.producer()
        if maker is None or maker.op_type in PROJECTIONS or maker.op_type.endswith("Normalization"):
            return product
        factor = _factor(flow, maker)
        if factor is None:
            return None
        product *= factor
        value = next(
            (source for source in maker.inputs if source is not None and flow.kinds.get(source) is ValueKind.TOKEN),
            None,
        )
    return product


def _below(flow: TokenFlow, node: ir.Node) -> tuple[float | None, float | None]:
    """The constants between the score product and the softmax, and what `Tanh` caps scores at."""
    product, softcap = 1.0, None
    value = node.outputs[0]
    for _ in range(32):
        users = [user for user, _ in value.uses()]
        if len(users) != 1 or users[0].op_type in _STOPS:
            break
        factor = _factor(flow, users[0])
        if factor is None:
            return None, softcap
        if users[0].op_type == "Tanh":
            after = [user for user, _ in users[0].outputs[0].uses()]
            softcap = _factor(flow, after[0]) if len(after) == 1 else None
        product *= factor
        value = users[0].outputs[0]
    return product, softcap
