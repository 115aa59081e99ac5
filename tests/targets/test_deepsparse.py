"""`deepsparse` writes what the engine of DeepSparse computes itself between two caches, and refuses the rest."""

from __future__ import annotations

import copy

import onnx
import pytest
from exports import export

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.workflow.build_target import build_target


def between_layers(model: onnx.ModelProto, operator: str) -> onnx.ModelProto:
    """Return the model with an operator between its first two layers, where it normalizes the second."""
    model = copy.deepcopy(model)
    norm = [node for node in model.graph.node if node.op_type == "LayerNormalization"][2]
    (source, *weights), (place, *_) = norm.input, [i for i, one in enumerate(model.graph.node) if one == norm]
    model.graph.node.insert(place, onnx.helper.make_node(operator, [source], ["inserted"]))
    norm.input[:] = ["inserted", *weights]
    return model


def test_layer_normalization_is_decomposed():
    built = build_target(export("gpt2_torchscript_eager"), "deepsparse", verify=False)
    operators = {node.op_type for node in built.model.graph}
    assert "LayerNormalization" not in operators
    assert built.model.graph.opset_imports[""] == 16


@pytest.mark.parametrize("operator", ["Abs", "Sin", "Erf"])
def test_operators_that_onnxruntime_computes_between_layers_are_refused(operator):
    model = between_layers(export("gpt2_torchscript_eager"), operator)
    with pytest.raises(
        UnsupportedError, match=f"internal cache gives wrong tokens after others, found {operator} - at"
    ):
        build_target(model, "deepsparse", verify=False)


def test_operators_that_the_engine_computes_are_taken():
    build_target(between_layers(export("gpt2_torchscript_eager"), "Tanh"), "deepsparse", verify=False)
