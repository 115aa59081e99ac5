"""Operators that compute a whole attention: `GroupQueryAttention` of com.microsoft, and `Attention` of ai.onnx.

Sources: docs/ContribOperators.md of onnxruntime and its CPU kernels; docs/Operators.md of ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.fusion.match import FusionMatch
from kvsurgeon.fusion.operator_rotary import OperatorRotary

OperatorName = Literal["group-query-attention", "attention"]


@dataclass(frozen=True, kw_only=True)
class AttentionOperator:
    """An operator that computes a whole attention.

    Attributes:
        domain: Domain of the operator; empty for ai.onnx.
        op_type: Type of the operator.
        since: First opset of ai.onnx that has the operator.
        bias: Index of the input that is added to the scores, [batch or 1, heads or 1, S, T].
        sink: Index of the input of attention sinks, [heads]; None if the operator has none.
        query_heads: Name of the attribute for the number of query heads.
        keeps_cache: Whether the operator reads and writes the KV cache and masks future tokens.
    """

    domain: str
    op_type: str
    since: int
    bias: int
    sink: int | None
    query_heads: str
    keeps_cache: bool

    def is_at(self, node: ir.Node) -> bool:
        """Return whether a node is this operator."""
        return (node.domain.replace("ai.onnx", ""), node.op_type) == (self.domain, self.op_type)

    def check(self, match: FusionMatch, opset: int) -> None:
        """Check that the operator supports a match.

        Raises:
            UnsupportedError: The opset lacks the operator, or it does not support the head_dim or a sink.
        """
        if opset < self.since:
            raise UnsupportedError(
                f"{self.op_type} is not in the model's opset", code=Code.OPSET, at=match.site.at.name,
                layer=match.layer, expected=f"opset {self.since}", found=f"opset {opset}",
                hint="run raise-opset first",
            )  # fmt: skip
        if self.sink is None and match.sink is not None:
            raise match.unsupported(
                f"{self.op_type} has no attention sinks", expected="scores of tokens alone",
                found=f"learned scores `{match.sink.name}`",
            )  # fmt: skip
        if self.keeps_cache and match.value.head_dim != match.key.head_dim:
            raise match.unsupported(
                f"{self.op_type} does not support values with another head_dim than keys",
                expected=f"head_dim {match.key.head_dim}", found=f"head_dim {match.value.head_dim}",
            )  # fmt: skip
        if self.keeps_cache and match.key.head_dim % 8:
            raise match.unsupported(
                f"{self.op_type} does not support this head_dim",
                expected="a multiple of 8", found=str(match.key.head_dim),
            )  # fmt: skip

    def attributes(self, match: FusionMatch) -> dict[str, Any]:
        """Return the attributes of the operator: numbers of heads, scale, softcap, window and rotation."""
        found = {self.query_heads: match.query.heads, "kv_num_heads": match.key.heads, "scale": match.path.scale}
        if match.path.softcap:
            found["softcap"] = match.path.softcap
        if match.mask is not None and match.mask.window is not None:
            found["local_window_size"] = match.mask.window
        if match.rotary is not None:
            found |= {"do_rotary": 1, "rotary_interleaved": int(match.rotary.interleaved)}
        return found

    def rotates(self, rotary: OperatorRotary) -> bool:
        """Return whether the kernel takes tables of this width."""
        head_dim, pairs = rotary.key.head_dim, rotary.cos.shape[1]
        return self.keeps_cache and pairs <= head_dim // 16 * 8


GROUP_QUERY_ATTENTION = AttentionOperator(
    domain="com.microsoft", op_type="GroupQueryAttention", since=1, bias=10, sink=11, query_heads="num_heads",
    keeps_cache=True,
)  # fmt: skip
ATTENTION = AttentionOperator(
    domain="", op_type="Attention", since=23, bias=3, sink=None, query_heads="q_num_heads", keeps_cache=False
)
OPERATORS: Mapping[OperatorName, AttentionOperator] = {
    "group-query-attention": GROUP_QUERY_ATTENTION, "attention": ATTENTION,
}  # fmt: skip
