"""Operators that compute a whole attention: `GroupQueryAttention` of com.microsoft, and `Attention` of ai.onnx.

Sources of what they compute: onnxruntime, docs/ContribOperators.md and its CPU kernels; ONNX, docs/Operators.md. What
is added to scores has a row for each new token and a column for each token so far.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.fusion.bias import Biases
from kvsurgeon.fusion.context import Setting
from kvsurgeon.fusion.match import Fusable
from kvsurgeon.fusion.rows import Rows
from kvsurgeon.symbolic import dimension as dim

Name = Literal["group-query-attention", "attention"]


@dataclass(frozen=True, kw_only=True)
class Cache:
    """What one operator remembers: its pasts, and the presents that it is to make."""

    past_key: ir.Value
    past_value: ir.Value
    present_key: ir.Value
    present_value: ir.Value


class Operator(ABC):
    """Puts an operator in the place of attentions."""

    op_type: ClassVar[str]
    domain: ClassVar[str]
    bias: ClassVar[int]  # index of the input

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.editor = setting.editor
        self.rows = Rows(setting)
        self.biases = Biases(setting)

    @classmethod
    @abstractmethod
    def check(cls, fusable: Fusable, opset: int) -> None:
        """Hold an attention against what the operator can compute.

        Raises:
            UnsupportedError: It cannot compute this one.
        """

    @classmethod
    def is_at(cls, node: ir.Node) -> bool:
        """Whether a node is this operator."""
        return (node.domain.replace("ai.onnx", ""), node.op_type) == (cls.domain, cls.op_type)

    @abstractmethod
    def attributes(self, fusable: Fusable) -> dict[str, Any]:
        """What the operator is told of an attention."""

    def place(self, fusable: Fusable, cache: Cache | None = None) -> ir.Node:
        """Add the operator; what it adds to scores, and who reads its result, is settled by `finish`."""
        memories = (fusable.query, fusable.key, fusable.value)
        inputs = [*(self.rows.rows_of(memory) for memory in memories), *self.further_inputs(fusable, cache)]
        name = self.editor.unique_name(f"{fusable.head.at.name}.attention")
        outputs = [ir.Value(name=name, type=ir.TensorType(fusable.dtype))]
        outputs += [] if cache is None else [cache.present_key, cache.present_value]
        attributes = self.attributes(fusable) | ({"softcap": fusable.softcap} if fusable.softcap else {})
        like = fusable.head.at.producer()
        return self.editor.operator(self.domain, self.op_type, inputs, attributes, outputs, like)

    def further_inputs(self, fusable: Fusable, cache: Cache | None) -> list[ir.Value | None]:
        """What the operator is given behind queries, keys and values."""
        return []

    def finish(self, fusable: Fusable, node: ir.Node) -> None:
        """Give the operator its bias, and its result to whoever read the attention's."""
        bias = self.biases.of(fusable)
        if bias is not None:
            node.resize_inputs(self.bias + 1)
            self.editor.replace_input(node, self.bias, bias)
        self.rows.continue_with(node.outputs[0], fusable.result)


class GroupQueryAttention(Operator):
    """Causal; reads and writes the cache itself, and of a buffer only the rows so far."""

    op_type = "GroupQueryAttention"
    domain = "com.microsoft"
    bias = 10

    @classmethod
    def check(cls, fusable: Fusable, opset: int) -> None:
        """Keys and values have heads of one width, a multiple of 8, of a type that the operator is declared for."""
        _check_type(fusable, cls.op_type, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        if fusable.value.head_dim != fusable.key.head_dim:
            raise UnsupportedError(
                f"{cls.op_type} takes no values of another width than keys", layer=fusable.layer,
                at=fusable.head.at.name, expected=str(fusable.key.head_dim), found=str(fusable.value.head_dim),
            )  # fmt: skip
        if fusable.key.head_dim % 8:
            raise UnsupportedError(
                f"{cls.op_type} takes no heads of such a width", layer=fusable.layer, at=fusable.head.at.name,
                expected="a multiple of 8", found=str(fusable.key.head_dim),
            )  # fmt: skip

    def attributes(self, fusable: Fusable) -> dict[str, Any]:
        """Counts of heads, and the scale."""
        return {"num_heads": fusable.query.heads, "kv_num_heads": fusable.key.heads, "scale": fusable.scale}

    def further_inputs(self, fusable: Fusable, cache: Cache | None) -> list[ir.Value | None]:
        """Pasts; int32 [batch], the place of the last token of each sequence; int32, tokens so far."""
        lengths, so_far = self.setting.lengths, self.setting.so_far
        last = lengths.repeated(dim.subtract(so_far, 1), fusable.key.batch)
        counts = [lengths.typed(value, ir.DataType.INT32) for value in (last, lengths.scalar(so_far))]
        pasts = [None, None] if cache is None else [cache.past_key, cache.past_value]
        return [*pasts, *counts]


class Attention(Operator):
    """Standard since opset 23; what masks future tokens is all in the bias."""

    op_type = "Attention"
    domain = ""
    bias = 3
    since: ClassVar[int] = 23

    @classmethod
    def check(cls, fusable: Fusable, opset: int) -> None:
        """The model's opset must have it."""
        if opset < cls.since:
            raise UnsupportedError(
                f"{cls.op_type} is not in the model's opset", at=fusable.head.at.name, layer=fusable.layer,
                expected=f"opset {cls.since}", found=str(opset), hint="raise-opset first",
            )  # fmt: skip

    def attributes(self, fusable: Fusable) -> dict[str, Any]:
        """Counts of heads, and the scale."""
        return {"q_num_heads": fusable.query.heads, "kv_num_heads": fusable.key.heads, "scale": fusable.scale}


OPERATORS: Mapping[Name, type[Operator]] = {"group-query-attention": GroupQueryAttention, "attention": Attention}


def _check_type(fusable: Fusable, operator: str, *able: ir.DataType) -> None:
    if fusable.dtype not in able:
        names = " or ".join(one.name.lower() for one in able)
        raise UnsupportedError(
            f"{operator} has no kernel for the type that is computed in", layer=fusable.layer,
            at=fusable.head.at.name, expected=names, found=fusable.dtype.name.lower(),
        )  # fmt: skip
