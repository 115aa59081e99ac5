"""A length that an export declares as a number, and that nothing in its graph depends on, as a symbol."""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import declared_dimensions, required_inputs
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.symbolic.dim_names import dim_names
from kvsurgeon.symbolic.dimension import LENGTH


def with_symbolic_length(model: ir.Model) -> ir.Model | None:
    """Return a copy of a model whose inputs declare the length as a symbol; None if it is one already.

    Something in the copy may depend on the number all the same: only the analysis and the proof of the copy can tell.
    """
    try:
        length = declared_dimensions(model.graph)[1]
    except UnsupportedError:
        return None
    if not isinstance(length, int) or length == 1:
        return None
    copy = copy_model(model)
    for value in required_inputs(copy.graph):
        if value.shape is not None:
            named = dim_names([LENGTH])[0]
            value.shape = ir.Shape([named if size == length else size for size in value.shape])
    for node in ir.traversal.RecursiveGraphIterator(copy.graph):
        for result in node.outputs:
            if result.shape is not None and length in result.shape and not result.is_graph_output():
                result.shape = None  # it may hold the length
    return copy
