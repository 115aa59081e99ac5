"""Which attentions are what a fused operator computes: softmax(softcap(scale * query @ key^T) + bias) @ value.

The bias is what the graph makes of scores of zero: whatever masks, positions and tables go into it need not be known.
What is found here is read off the operators; `kvsurgeon.fusion.numeric_check` runs them and compares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis, AttentionSite, CachedOperand
from kvsurgeon.analysis.cache_points import CachePoint, describe
from kvsurgeon.analysis.token_flow import FusedAttention, TokenFlow
from kvsurgeon.anatomy.scales import number_of
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.fusion.score_path import MOVES, find_way, is_token, number_beside
from kvsurgeon.rewrite.layout_trace import LayoutTrace, read

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True, kw_only=True)
class Fusable:
    """An attention that a fused operator computes.

    Attributes:
        layer: Its number.
        head: What was found of it.
        query: How the score product's queries lie, as [batch, heads, sequence, head_dim].
        key: What is remembered of the keys, and what the score product reads, up to repeats and single numbers.
        value: The same of the values.
        result: How the context product's result lies.
        scale: What the products of remembered keys with queries are multiplied with.
        softcap: What they are capped at by a tangent; 0 where they are not.
        steps: The operators between scores and softmax; none where one operator does it all.
        masked: What enters the softmax, or the mask of that operator; None where it has none.
    """

    layer: int
    head: AttentionSite
    query: CachePoint
    key: CachePoint
    value: CachePoint
    result: CachePoint
    scale: float
    softcap: float
    steps: tuple[ir.Node, ...]
    masked: ir.Value | None

    @property
    def scores(self) -> ir.Value | None:
        """The output of the score product; None where one operator does it all."""
        return self.head.scores[0].node.outputs[0] if self.head.scores else None

    @property
    def dtype(self) -> ir.DataType:
        """The type that it computes in."""
        return self.query.dtype


def find_fusable(analysis: Analysis, layer: int, *, cached: bool) -> Fusable:
    """Return one attention as a fused operator computes it.

    Args:
        analysis: The decoder.
        layer: Number of the attention.
        cached: Whether the operator keeps keys and values too, so that it must be given what is remembered.

    Raises:
        UnsupportedError: It computes something else; the message names what.
    """
    try:
        return _Matcher(analysis.flow, analysis.heads[layer], layer, cached).match()
    except UnsupportedError as refusal:
        refusal.layer = layer
        raise


class _Matcher:
    """Looks at one attention."""

    def __init__(self, flow: TokenFlow, head: AttentionSite, layer: int, cached: bool) -> None:
        self.flow = flow
        self.head = head
        self.layer = layer
        self.cached = cached
        self.before = {node: tuple(node.inputs) for node in flow.order}

    def match(self) -> Fusable:
        """Look at it from the products to the softmax."""
        if self.head.fused is not None:
            return self._of_one_operator(self.head.fused)
        self._check_products()
        score, product = self.head.scores[0], self.head.products[0]
        query, scaled = self._query(score.node.inputs[score.query_index()])
        way = find_way(self.flow, self.head)
        alpha = score.node.attributes.get_float("alpha", 1.0) if score.node.op_type == "FusedMatMul" else 1.0
        result = self._described(product.node.outputs[0])
        return self._fusable(query, result, way.scale * scaled * alpha, way.softcap, way.steps, way.masked)

    def _of_one_operator(self, fused: FusedAttention) -> Fusable:
        """An operator of the standard states what it computes."""
        call = self.flow.shapes.call(fused.node)
        heads = 1 if fused.heads_beside == 1 else call.integer("q_num_heads", 1)
        query = self._described(fused.node.inputs[fused.query], heads)
        result = self._described(fused.node.outputs[0], heads)
        scale = fused.node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(query.head_dim)
        masked = None if fused.mask is None else fused.node.inputs[fused.mask]
        return self._fusable(query, result, scale, fused.node.attributes.get_float("softcap", 0.0), (), masked)

    def _fusable(
        self, query: CachePoint, result: CachePoint, scale: float, softcap: float, steps: tuple[ir.Node, ...],
        masked: ir.Value | None,
    ) -> Fusable:  # fmt: skip
        (key, keys_scaled), (value, _) = self._kept(self.head.keys[0]), self._kept(self.head.values[0])
        if key.heads != value.heads and not self.cached:
            (key, keys_scaled), (value, _) = self._read(self.head.keys[0]), self._read(self.head.values[0])
        self._check_heads(query, result, key, value)
        return Fusable(
            layer=self.layer, head=self.head, query=query, key=key, value=value, result=result,
            scale=scale * keys_scaled, softcap=softcap, steps=steps, masked=masked,
        )  # fmt: skip

    def _check_products(self) -> None:
        scores, products = self.head.scores, self.head.products
        if len(scores) != 1 or len(products) != 1 or self.head.beside:
            raise UnsupportedError(
                "scores are made of more than one product of queries and keys", at=self.head.at.name,
                expected="one score product and one context product",
                found=f"{len(scores)} and {len(products)}" + (", and other token data" if self.head.beside else ""),
            )  # fmt: skip

    def _kept(self, operand: CachedOperand) -> tuple[CachePoint, float]:
        """Keys or values as the operator is given them, and what they are multiplied with after that."""
        node, index = operand.place
        value, is_key = node.inputs[index], operand in self.head.keys
        assert value is not None
        reading = read(self.flow, self.before, value, operand.memory)
        scale = None if reading is None or (reading.scales and not is_key) else self._scale_of(reading)
        if scale is not None:
            return operand.memory, scale
        if not self.cached:
            return self._read(operand)
        raise UnsupportedError(
            f"{'keys' if is_key else 'values'} are computed with between the cache and their product", at=value.name,
            expected="axes that are moved, and heads that are repeated", found=f"`{operand.memory.value.name}` cached",
        )  # fmt: skip

    def _read(self, operand: CachedOperand) -> tuple[CachePoint, float]:
        """Keys or values as the product reads them."""
        node, index = operand.place
        return self._described(node.inputs[index]), 1.0

    def _scale_of(self, reading: LayoutTrace) -> float | None:
        """The product of single numbers; None where one is not constant."""
        scale = 1.0
        for operator, value in reading.scales:
            number = number_of(self.flow, value)
            if not number:
                return None
            scale = scale * number if operator == "Mul" else scale / number
        return scale

    def _query(self, operand: ir.Value | None) -> tuple[CachePoint, float]:
        """The queries before they are multiplied with single numbers, and the product of these."""
        found, scale = self._described(operand), 1.0
        value, factor = operand, 1.0
        while value is not None and (node := value.producer()) is not None and node in self.before:
            if node.op_type in MOVES:
                value = node.inputs[0]
                continue
            tokens = [one for one in node.inputs if is_token(self.flow, one)]
            number = number_beside(self.flow, node, tokens[0]) if len(tokens) == 1 else None
            if number is None:
                break
            value, factor = tokens[0], factor * number
            memory = None if value is None else describe(self.flow, value)
            if memory is not None and (memory.heads, memory.head_dim) == (found.heads, found.head_dim):
                found, scale = memory, factor
        return found, scale

    def _described(self, value: ir.Value | None, heads: int = 1) -> CachePoint:
        found = None if value is None else describe(self.flow, value, heads)
        if found is None:
            raise UnsupportedError("heads and their features cannot be told apart", at=getattr(value, "name", None))
        return found

    def _check_heads(self, query: CachePoint, result: CachePoint, key: CachePoint, value: CachePoint) -> None:
        at = self.head.at.name
        if key.value is value.value:
            raise UnsupportedError(
                "keys and values are one tensor, which the operator would keep twice", at=key.value.name
            )
        if key.dtype not in _FLOATS or {query.dtype, value.dtype, result.dtype} != {key.dtype}:
            raise UnsupportedError(
                "keys and values are not of the type that is computed in", at=at, found=str(key.dtype)
            )
        if query.head_dim != key.head_dim or result.head_dim != value.head_dim:
            raise UnsupportedError(
                "what is remembered has heads of another width than the products", at=at,
                expected=f"{query.head_dim} and {result.head_dim} features", found=f"{key.head_dim}, {value.head_dim}",
            )  # fmt: skip
        if key.heads != value.heads or query.heads % key.heads or result.heads != query.heads:
            raise UnsupportedError(
                "queries do not share the heads of keys and values evenly", at=at,
                expected=f"{query.heads} query heads", found=f"{key.heads} heads of keys and {value.heads} of values",
            )  # fmt: skip
