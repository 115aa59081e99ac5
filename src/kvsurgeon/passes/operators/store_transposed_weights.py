"""Store the transpose of weights that a product reads transposed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import is_operator, uses_of
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.weights.transposed_tensor import TransposedTensor


@dataclass(frozen=True, kw_only=True)
class StoreTransposedWeights:
    """Store the transpose of weights, so that a product reads an initializer, which quantizers need.

    Before: `MatMul(h, Transpose(embeddings))`, the output projection of a model with tied embeddings. After:
    `MatMul(h, W)`, where `W` is the transpose. It is computed when the model is saved. Weights that other nodes read as
    they are stay, and the file grows by as much.

    Not handled: weights of other than two axes, and of less than 8 bits.
    """

    name: ClassVar[str] = "store-transposed-weights"

    def apply(self, subject: Subject) -> Outcome:
        """Replace the transposes of weights in `subject.model`."""
        editor = Editor(subject.model)
        stored: dict[ir.Value, ir.Value] = {}
        for node in list(subject.model.graph):
            weight = _transposed(node)
            if weight is None:
                continue
            tensor = constant_tensor(weight)
            assert tensor is not None
            if weight not in stored:
                name = editor.unique_name(f"{weight.name}.transposed")
                stored[weight] = editor.initializer(TransposedTensor(tensor, name=name))
            node.outputs[0].replace_all_uses_with(stored[weight])
            editor.edits += 1
        if not stored:
            return Unchanged(reason="no product reads the transpose of weights")
        editor.finish()
        return Changed(edits=editor.edits)


def _transposed(node: ir.Node) -> ir.Value | None:
    """Return the weights that a node transposes for products; None for other nodes."""
    weight = node.inputs[0] if is_operator(node, "Transpose") else None
    tensor = constant_tensor(weight)
    if tensor is None or len(tensor.shape) != 2 or tensor.dtype.bitwidth < 8:
        return None
    if tuple(node.attributes.get_ints("perm") or (1, 0)) != (1, 0) or node.outputs[0].is_graph_output():
        return None
    users = uses_of(node.outputs[0])
    return weight if users and all(is_operator(user, "MatMul") and index == 1 for user, index in users) else None
