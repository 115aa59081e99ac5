"""Simplify a model: inline local functions, remove sequences, roll up loops, and multiply two tensors at a time."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from kvsurgeon.decompose.causal_convolutions import drop_padded_ends, may_drop_padding
from kvsurgeon.decompose.chunked_regions import may_be_chunked
from kvsurgeon.decompose.delta_rule import replace_chunked_rules
from kvsurgeon.decompose.einsums import is_splittable, split_einsums
from kvsurgeon.decompose.scan_builder import roll_up_loops
from kvsurgeon.decompose.sequences import MAKERS, remove_sequences
from kvsurgeon.decompose.unrolled_loops import may_be_unrolled
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor


def simplify_model(model: ir.Model) -> ir.Model:
    """Return a model without local functions, sequences, and `Einsum` of more than two tensors.

    The original is not changed: the result is a copy, or the original itself if there is nothing to simplify.
    """
    calls = any(node.op_identifier() in model.functions for node in model.graph.all_nodes())
    sequences = any(node.op_type in MAKERS for node in model.graph)
    certain = calls or sequences or any(is_splittable(node) for node in model.graph)
    rewritten = may_be_unrolled(model.graph), may_drop_padding(model.graph), may_be_chunked(model.graph)
    if not certain and not any(rewritten):
        return model
    copy = copy_model(model)
    if calls:
        _align_local_domains(copy)
        InlinePass()(copy)
    editor = Editor(copy)
    remove_sequences(editor)
    split_einsums(editor)
    if may_drop_padding(copy.graph):
        drop_padded_ends(editor)
    if may_be_chunked(copy.graph):
        replace_chunked_rules(editor)
    if may_be_unrolled(copy.graph):
        roll_up_loops(editor)
    return copy if certain or editor.edits else model


def _align_local_domains(model: ir.Model) -> None:
    """Set one version for the domains of local functions: exporters write different ones, which mean nothing."""
    local = {domain for domain, _, _ in model.functions}
    for function in model.functions.values():
        for domain in local & set(function.opset_imports) & set(model.opset_imports):
            function.opset_imports[domain] = model.opset_imports[domain]
