"""At a decode step nothing costs the square of the context, and tables of positions cost one row."""

import numpy as np
import onnx
import pytest
from exports import NAMES, injected_export, with_all_outputs
from laws import in_onnxruntime

SHORT, LONG = 25, 50  # past tokens


def sizes_of_a_step(model: onnx.ModelProto, past: int) -> dict[str, int]:
    """Elements of every value that one decode step makes after so many tokens."""
    feeds = {"input_ids": np.ones((1, 1), np.int64), "attention_mask": np.ones((1, past + 1), np.int64)}
    for value in model.graph.input:
        if value.name not in feeds:
            heads, _, width = (size.dim_value for size in value.type.tensor_type.shape.dim[1:])
            feeds[value.name] = np.ones((1, heads, past, width), np.float32)
    return {name: array.size for name, array in in_onnxruntime(with_all_outputs(model))(feeds).items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_decode_step_is_linear_in_the_context(name):
    model = injected_export(name)
    short, long = sizes_of_a_step(model, SHORT), sizes_of_a_step(model, LONG)

    square = [value for value in short if long[value] * (SHORT + 1) > short[value] * (LONG + 1) + LONG]
    assert not square

    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    grown = [value for value, maker in makers.items() if maker in ("Cos", "Sin") and long[value] != short[value]]
    assert not grown
