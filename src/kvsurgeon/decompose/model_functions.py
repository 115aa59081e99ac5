"""The same graph in plainer words: local functions written out, sequences taken apart, products of two at a time."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from kvsurgeon.decompose.einsums import can_be_plainer, multiply_in_pairs
from kvsurgeon.decompose.sequences import MAKERS, take_sequences_apart


def simplify_model(model: ir.Model) -> ir.Model:
    """Return the model without calls of local functions, sequences, and Einstein sums of more than two tensors.

    The model itself where there is nothing to write out; else a copy, so that the original stays as it was.
    """
    calls = any(node.op_identifier() in model.functions for node in model.graph.all_nodes())
    sequences = any(node.op_type in MAKERS for node in model.graph)
    sums = any(can_be_plainer(node) for node in model.graph)
    if not calls and not sequences and not sums:
        return model
    copy = model.clone()
    copy.meta.update(model.meta)
    if calls:
        _agree_on_local_domains(copy)
        InlinePass()(copy)
    take_sequences_apart(copy.graph)
    multiply_in_pairs(copy.graph)
    return copy


def _agree_on_local_domains(model: ir.Model) -> None:
    """Versions of the functions' own domains mean nothing, but exporters write different ones in different places."""
    local = {domain for domain, _, _ in model.functions}
    for function in model.functions.values():
        for domain in local & set(function.opset_imports) & set(model.opset_imports):
            function.opset_imports[domain] = model.opset_imports[domain]
