"""When do two attentions make weights of scores in the same way? Then it is enough to look at one of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis, AttentionSite
from kvsurgeon.analysis.subgraph_runner import downstream
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.graph.constants import small_constant


class StructuralHash:
    """Numbers for ways of making weights: the same operators reading the same context have the same number."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self._numbers: dict[object, int] = {}

    def of(self, head: AttentionSite, beside: Sequence[ir.Value]) -> int:
        """Return the number of an attention's way, and of what else is made of its scores."""
        return self._number(self._fused(head) if head.fused is not None else self._written_out(head, beside))

    def _number(self, what: object) -> int:
        return self._numbers.setdefault(what, len(self._numbers))

    def _fused(self, head: AttentionSite) -> object:
        assert head.fused is not None
        mask = head.fused.node.inputs[head.fused.mask] if head.fused.mask is not None else None
        return "fused", head.fused.causal, None if mask is None else self.analysis.same.get(mask, mask)

    def _written_out(self, head: AttentionSite, beside: Sequence[ir.Value]) -> object:
        shapes = self.analysis.flow.shapes
        names: dict[ir.Value, int] = {}
        for index, score in enumerate(head.scores):
            value = score.node.outputs[0]
            names[value] = self._number(("scores", index, shapes[value].shape, self._borders(value)))
        for index, (node, place) in enumerate(head.beside):
            if (met := node.inputs[place]) is not None:
                names[met] = self._number(("beside", index, shapes[met].shape))
        between = downstream(head.stand_ins, head.ends)
        weights = [value for product in head.products for value in product.weights_read]
        return "written out", tuple(self._name(value, names, between) for value in (*weights, *beside))

    def _borders(self, value: ir.Value) -> object:
        return tuple((axis.ahead, axis.behind) for axis in self.analysis.flow.axes[value])

    def _name(self, value: ir.Value | None, names: dict[ir.Value, int], between: Collection[ir.Value]) -> int:
        if value is None:
            return -1
        if value not in names:
            names[value] = self._number(self._made(value, names, between))
        return names[value]

    def _made(self, value: ir.Value, names: dict[ir.Value, int], between: Collection[ir.Value]) -> object:
        flow = self.analysis.flow
        if flow.kinds.get(value) is ValueKind.CONTEXT:
            return self.analysis.same.get(value, value)
        constant, node = small_constant(value), value.producer()
        if constant is not None:
            return str(constant.dtype), constant.shape, constant.tobytes()
        if node is None or flow.kinds.get(value) is not ValueKind.TOKEN:
            return value
        if value not in between:
            return "other token data", flow.shapes[value].shape
        attributes = tuple((key, repr(attribute.value)) for key, attribute in node.attributes.items())
        sources = tuple(self._name(source, names, between) for source in node.inputs)
        return node.op_type, value.index(), attributes, sources
