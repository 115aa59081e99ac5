"""Replace attention sites by fused operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from kvsurgeon.fusion.bias import AttentionBias
from kvsurgeon.fusion.context import FusionContext
from kvsurgeon.fusion.hidden_layout import HiddenLayout
from kvsurgeon.fusion.match import FusionMatch
from kvsurgeon.fusion.operators import AttentionOperator
from kvsurgeon.rewrite.cache_tensors import CacheTensor
from kvsurgeon.symbolic import dimension as dim


class AttentionFuser:
    """Adds fused operators to a graph, and connects them when the context slices are in place."""

    def __init__(self, operator: AttentionOperator, context: FusionContext) -> None:
        self.operator = operator
        self.context = context
        self.editor = context.editor
        self.layout = HiddenLayout(context)
        self.bias = AttentionBias(context)
        self._unfinished: list[tuple[FusionMatch, ir.Node]] = []

    def place_all(
        self, matches: Sequence[FusionMatch], pasts: Mapping[CacheTensor, ir.Value]
    ) -> dict[CacheTensor, ir.Value]:
        """Add one operator for each match, and return the cache outputs that they compute.

        Args:
            matches: Attention sites to replace.
            pasts: Cache inputs of the model by cached tensor.
        """
        by_value = {entry.point.value: (entry, past) for entry, past in pasts.items()}
        presents: dict[CacheTensor, ir.Value] = {}
        for match in matches:
            pairs = [by_value[match.key.value], by_value[match.value.value]]
            outputs = [self._present(entry, presents) for entry, _ in pairs]
            self.place(match, [past for _, past in pairs], outputs)
        return presents

    def place(
        self, match: FusionMatch, pasts: Sequence[ir.Value | None] = (None, None), presents: Sequence[ir.Value] = ()
    ) -> None:
        """Add the operator of a match; `finish` sets its bias and connects its result."""
        inputs = [self.layout.convert(point) for point in (match.query, match.key, match.value)]
        further = [*pasts, *self._sequence_lengths(match)] if self.operator.keeps_cache else []
        name = self.editor.unique_name(f"{match.site.at.name}.attention")
        outputs = [ir.Value(name=name, type=ir.TensorType(match.dtype)), *presents]
        node = self.editor.operator(
            self.operator.domain, self.operator.op_type, [*inputs, *further], self.operator.attributes(match),
            outputs, match.site.at.producer(),
        )  # fmt: skip
        self._unfinished.append((match, node))

    def finish(self) -> None:
        """Set the bias of the new operators and replace the results of their sites."""
        for match, node in self._unfinished:
            bias = self.bias.of(match)
            if bias is not None:
                node.resize_inputs(self.operator.bias + 1)
                self.editor.replace_input(node, self.operator.bias, bias)
            self.layout.replace(match.result, node.outputs[0])
        self._unfinished.clear()

    def _sequence_lengths(self, match: FusionMatch) -> list[ir.Value]:
        """Return `seqlens_k` (T - 1 for each sequence, int32 [batch]) and `total_sequence_length` (int32 scalar)."""
        lengths, total = self.context.lengths, self.context.total
        values = (lengths.repeated(dim.subtract(total, 1), match.key.batch), lengths.scalar(total))
        return [lengths.typed(value, ir.DataType.INT32) for value in values]

    def _present(self, entry: CacheTensor, presents: dict[CacheTensor, ir.Value]) -> ir.Value:
        """Return a new present; layers that share keys and values write it once, and the others a copy."""
        name = self.editor.unique_name(f"{entry.present}.again") if entry in presents else entry.present
        present = ir.Value(name=name, type=ir.TensorType(entry.dtype))
        presents.setdefault(entry, present)
        return present
