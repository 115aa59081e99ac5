"""The same graph in plainer words: calls of local functions written out, sequences of tensors taken apart."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from kvsurgeon.graph.constants import small_constant


def in_plain_words(model: ir.Model) -> ir.Model:
    """Return the model without calls of local functions and without sequences, where they can be written out.

    The model itself where there is nothing to write out; else a copy, so that the original stays as it was.
    """
    calls = any(node.op_identifier() in model.functions for node in model.graph.all_nodes())
    splits = any(node.op_type == "SplitToSequence" for node in model.graph)
    if not calls and not splits:
        return model
    copy = model.clone()
    copy.meta.update(model.meta)
    if calls:
        _agree_on_local_domains(copy)
        InlinePass()(copy)
    _take_sequences_apart(copy.graph)
    return copy


def _agree_on_local_domains(model: ir.Model) -> None:
    """Versions of the functions' own domains mean nothing, but exporters write different ones in different places."""
    local = {domain for domain, _, _ in model.functions}
    for function in model.functions.values():
        for domain in local & set(function.opset_imports) & set(model.opset_imports):
            function.opset_imports[domain] = model.opset_imports[domain]


def _take_sequences_apart(graph: ir.Graph) -> None:
    """`SplitToSequence` whose parts are taken by constant numbers is a `Split`."""
    for node in list(graph):
        sizes = small_constant(node.inputs[1]) if node.op_type == "SplitToSequence" and len(node.inputs) > 1 else None
        takers = [user for user, _ in node.outputs[0].uses()]
        places = [small_constant(user.inputs[1]) for user in takers if user.op_type == "SequenceAt"]
        if sizes is None or sizes.ndim != 1 or len(places) < len(takers) or any(place is None for place in places):
            continue
        parts = ir.Node(
            "", "Split", node.inputs[:2], [ir.AttrInt64("axis", _axis(node))],
            num_outputs=len(sizes), name=node.name, metadata_props=dict(node.metadata_props),
        )  # fmt: skip
        for number, value in enumerate(parts.outputs):
            value.name = f"{node.outputs[0].name}.{number}"
        graph.insert_before(node, parts)
        for user, place in zip(takers, places, strict=True):
            assert place is not None
            user.outputs[0].replace_all_uses_with(parts.outputs[int(place)])
        graph.remove([*takers, node], safe=True)


def _axis(node: ir.Node) -> int:
    attribute = node.attributes.get("axis")
    return 0 if attribute is None else int(attribute.value)
