"""The stored weights of the projections around attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.calibration.shared_heads import query_of
from kvsurgeon.calibration.weight_products import WeightOperand, product_above, product_below
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import is_operator
from kvsurgeon.heads.index_trace import IndexTrace


def projection_weights(analysis: Analysis) -> list[ir.Value]:
    """Return the weights and biases that compute queries, keys and values, and read the results of attention.

    Raises:
        UnsupportedError: Those of a layer cannot be found, or are quantized.
    """
    trace = IndexTrace(analysis.flow)
    operands = (operand for site in analysis.sites for operand in _operands(trace, site))
    return list(dict.fromkeys(_initializer(operand) for operand in operands))


def _operands(trace: IndexTrace, site: AttentionSite) -> Iterator[WeightOperand]:
    for value in dict.fromkeys((query_of(site), *(one.cache_point.value for one in (*site.keys, *site.values)))):
        yield from product_above(trace, value).operands
    yield from product_below(trace, site.at).operands


def _initializer(operand: WeightOperand) -> ir.Value:
    value = operand.node.inputs[operand.index]
    node = None if value is None else value.producer()
    while value is not None and node is not None and is_operator(node, "Identity", "Transpose"):
        value, node = node.inputs[0], None if node.inputs[0] is None else node.inputs[0].producer()
    if value is None or not value.is_initializer():
        raise UnsupportedError(
            "cannot train weights that are not an initializer", code=Code.NOT_TRAINABLE,
            at=operand.node.outputs[0].name,
        )  # fmt: skip
    return value


def replace_weights(model: ir.Model, weights: Mapping[ir.Value, np.ndarray]) -> int:
    """Replace initializers by others of the same name, shape and type; return the number of edits.

    Args:
        model: The model, which may be another form of the one whose values are given.
        weights: The new elements, by a value of the same name and tensor.

    Raises:
        UnsupportedError: The model does not store one of the tensors.
    """
    stored = model.graph.initializers
    for value in weights:
        if getattr(stored.get(value.name or ""), "const_value", None) is not value.const_value:
            raise UnsupportedError(
                "the model stores these weights in another form", code=Code.NOT_TRAINABLE, at=value.name
            )  # fmt: skip
    editor = Editor(model)
    for value, array in weights.items():
        old = stored[value.name or ""]
        assert old.dtype is not None
        name = editor.unique_name(f"{old.name}.trained")
        new = editor.initializer(ir.Tensor(array.astype(old.dtype.numpy()), dtype=old.dtype, name=name))
        for node, index in tuple(old.uses()):
            editor.replace_input(node, index, new)
    editor.finish()
    return editor.edits
