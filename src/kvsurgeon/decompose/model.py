"""A model without operators of com.microsoft that do several things at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from kvsurgeon.dataflow.input_roles import read_inputs
from kvsurgeon.dataflow.shape_inference import STANDARD_DOMAINS, infer_shapes
from kvsurgeon.decompose.embedding import embed_layer_normalization, quantised_embed_layer_normalization
from kvsurgeon.decompose.group_query_attention import group_query_attention
from kvsurgeon.decompose.model_functions import simplify_model
from kvsurgeon.decompose.multi_head_attention import multi_head_attention
from kvsurgeon.decompose.node_builder import Pen
from kvsurgeon.decompose.onnx_attention import says_more, standard_attention
from kvsurgeon.decompose.packed_attention import attention, quantised_attention
from kvsurgeon.graph.query import find_live

RULES: dict[tuple[str, str], Callable[[Pen], None]] = {
    ("com.microsoft", "Attention"): attention,
    ("com.microsoft", "QAttention"): quantised_attention,
    ("com.microsoft", "MultiHeadAttention"): multi_head_attention,
    ("com.microsoft", "GroupQueryAttention"): group_query_attention,
    ("com.microsoft", "EmbedLayerNormalization"): embed_layer_normalization,
    ("com.microsoft", "QEmbedLayerNormalization"): quantised_embed_layer_normalization,
}


@dataclass(frozen=True, kw_only=True)
class DecomposedModel:
    """A model in standard operators.

    Attributes:
        model: It; the original itself where there was nothing to write out.
        assumed: What had to be assumed, and where first.
    """

    model: ir.Model
    assumed: Mapping[str, str] = field(default_factory=dict)


def decompose(model: ir.Model) -> DecomposedModel:
    """Return the model in plain words and without such operators of com.microsoft; the original stays as it was.

    Raises:
        UnsupportedError: One has inputs or attributes that say something that is not known here, such as a past.
    """
    plain = simplify_model(model)
    if not any(_rule(node) for node in plain.graph):
        return DecomposedModel(model=plain)
    copy = plain.clone()
    copy.meta.update(plain.meta)
    return DecomposedModel(model=copy, assumed=_write_out(copy.graph))


def _write_out(graph: ir.Graph) -> dict[str, str]:
    alive = find_live(graph)
    dimensions, _ = read_inputs(graph)
    shapes = infer_shapes([node for node in graph if node in alive], dimensions, graph.opset_imports.get("", 1))
    assumed: dict[str, str] = {}
    taken = {value.name or "" for node in graph for value in node.outputs}
    taken.update(graph.initializers, (value.name or "" for value in graph.inputs))
    for node in list(graph):
        rule = _rule(node)
        if rule is not None and node in alive:
            pen = Pen(graph, node, shapes, taken)
            rule(pen)
            for what in sorted(pen.assumed):
                assumed.setdefault(what, pen.name)
    return assumed


def _rule(node: ir.Node) -> Callable[[Pen], None] | None:
    if node.domain in STANDARD_DOMAINS and node.op_type == "Attention":
        return standard_attention if says_more(node) else None
    return RULES.get((node.domain, node.op_type))
