"""Replace attention sites by fused operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import onnx_ir as ir

from kvsurgeon.fusion.bias import AttentionBias
from kvsurgeon.fusion.context import FusionContext
from kvsurgeon.fusion.hidden_layout import HiddenLayout
from kvsurgeon.fusion.match import FusionMatch
from kvsurgeon.fusion.operator_rotary import OperatorRotary
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
        rotary = match.rotary
        query, key = (match.query, match.key) if rotary is None else (rotary.query, rotary.key)
        inputs = [self.layout.convert(point) for point in (query, key, match.value)]
        further = [*pasts, *self._sequence_lengths(match)] if self.operator.keeps_cache else []
        if rotary is not None:
            further += self._tables(rotary)
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
            bias = None if match.mask is not None else self.bias.of(match)
            for place, value in ((self.operator.bias, bias), (self.operator.sink, self._sink(match))):
                if place is not None and value is not None:
                    node.resize_inputs(place + 1)
                    self.editor.replace_input(node, place, value)
            self.layout.replace(match.result, node.outputs[0])
        self._unfinished.clear()

    def _sink(self, match: FusionMatch) -> ir.Value | None:
        """Return the learned scores of the attention sinks, [heads]."""
        source, lengths, dtype = match.sink, self.context.lengths, match.dtype
        if source is None:
            return None
        count = dim.product(self.context.flow.shapes[source].shape or ())
        value = self.editor.node("Reshape", [source, lengths.vector([count])], name=f"{source.name}.flat", dtype=dtype)
        if count != match.query.heads:
            inputs = [value, lengths.vector([match.query.heads])]
            value = self.editor.node("Expand", inputs, name=f"{source.name}.by_head", dtype=dtype)
        return value

    def _sequence_lengths(self, match: FusionMatch) -> list[ir.Value]:
        """Return `seqlens_k` (T - 1 for each sequence, int32 [batch]) and `total_sequence_length` (int32 scalar)."""
        lengths, total = self.context.lengths, self.context.total
        lasts = lengths.repeated(dim.subtract(total, 1), match.key.batch)
        if self.context.padding is not None:
            lasts = lengths.once("last tokens", self._last_tokens)
        return [lengths.typed(value, ir.DataType.INT32) for value in (lasts, lengths.scalar(total))]

    def _last_tokens(self) -> ir.Value:
        """Return the index of the last token of each sequence, int64 [batch]."""
        mask, int64 = self.context.padding, ir.DataType.INT64
        assert mask is not None
        if mask.dtype is not int64:
            mask = self.editor.node("Cast", [mask], {"to": int(int64)}, name=f"{mask.name}.numbers", dtype=int64)
        axes, one = self.editor.constant([1], name="tokens_axis"), self.editor.constant(1, name="one")
        inputs = [mask, axes] if self.editor.graph.opset_imports.get("", 1) >= 13 else [mask]
        options = {"keepdims": 0} | ({} if len(inputs) > 1 else {"axes": [1]})
        counts = self.editor.node("ReduceSum", inputs, options, name="token_counts", dtype=int64)
        return self.editor.node("Sub", [counts, one], name="last_tokens", dtype=int64)

    def _tables(self, rotary: OperatorRotary) -> list[ir.Value]:
        """Return the tables of cosines and sines, [positions, rotary_dim / 2]."""
        lengths, dtype = self.context.lengths, rotary.key.dtype.numpy()
        tables = (("cos", rotary.cos), ("sin", rotary.sin))
        return [
            lengths.once((name, id(table)), partial(self.editor.constant, table, dtype, name=f"rotary_{name}"))
            for name, table in tables
        ]

    def _present(self, entry: CacheTensor, presents: dict[CacheTensor, ir.Value]) -> ir.Value:
        """Return a new present; layers that share keys and values write it once, and the others a copy."""
        name = self.editor.unique_name(f"{entry.present}.again") if entry in presents else entry.present
        present = ir.Value(name=name, type=ir.TensorType(entry.dtype))
        presents.setdefault(entry, present)
        return present
