"""Decompose the fused operators of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from kvsurgeon.dataflow.input_roles import read_inputs
from kvsurgeon.dataflow.shape_inference import infer_shapes
from kvsurgeon.decompose.embedding import (
    embed_layer_normalization,
    quantized_embed_layer_normalization,
)
from kvsurgeon.decompose.fused_node import FusedNode
from kvsurgeon.decompose.group_query_attention import group_query_attention
from kvsurgeon.decompose.multi_head_attention import multi_head_attention
from kvsurgeon.decompose.onnx_attention import needs_decomposition, onnx_attention
from kvsurgeon.decompose.packed_attention import attention, quantized_attention
from kvsurgeon.decompose.simplify import simplify_model
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import find_live

RULES: dict[tuple[str, str], Callable[[FusedNode], None]] = {
    ("com.microsoft", "Attention"): attention,
    ("com.microsoft", "QAttention"): quantized_attention,
    ("com.microsoft", "MultiHeadAttention"): multi_head_attention,
    ("com.microsoft", "GroupQueryAttention"): group_query_attention,
    ("com.microsoft", "EmbedLayerNormalization"): embed_layer_normalization,
    ("com.microsoft", "QEmbedLayerNormalization"): quantized_embed_layer_normalization,
}


@dataclass(frozen=True, kw_only=True)
class DecomposedModel:
    """A model in standard operators.

    Attributes:
        model: The model; the original itself if it has nothing to decompose.
        assumed: Assumptions of the decomposition, each with the first value that needs it.
    """

    model: ir.Model
    assumed: Mapping[str, str] = field(default_factory=dict)


def decompose(model: ir.Model) -> DecomposedModel:
    """Return a model in standard operators, without local functions and sequences; the original is not changed.

    Raises:
        UnsupportedError: A fused operator has unsupported inputs or attributes, such as a past.
    """
    simple = simplify_model(model)
    if not any(_rule(node) for node in simple.graph):
        return DecomposedModel(model=simple)
    copy = simple.clone()
    copy.meta.update(simple.meta)
    return DecomposedModel(model=copy, assumed=_decompose_nodes(copy))


def _decompose_nodes(model: ir.Model) -> dict[str, str]:
    """Decompose the nodes in place, and return the assumptions."""
    graph = model.graph
    live = find_live(graph)
    dimensions, _ = read_inputs(graph)
    shapes = infer_shapes([node for node in graph if node in live], dimensions, graph.opset_imports.get("", 1))
    assumed: dict[str, str] = {}
    editor = Editor(model)
    for node in list(graph):
        rule = _rule(node)
        if rule is not None and node in live:
            op = FusedNode(editor, node, shapes)
            rule(op)
            for assumption in sorted(op.assumed):
                assumed.setdefault(assumption, op.name)
    return assumed


def _rule(node: ir.Node) -> Callable[[FusedNode], None] | None:
    return onnx_attention if needs_decomposition(node) else RULES.get((node.domain, node.op_type))
