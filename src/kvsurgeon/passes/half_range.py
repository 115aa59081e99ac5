"""Keep the numbers that hide tokens within the range of half precision. Written with onnx-graphsurgeon."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

# Where such a number is one of two to choose from, is added to scores, or multiplied with a mask of 0 and 1.
# A bound of `Clip` or `Max` is none of these, and stays.
HIDING = frozenset({"Where", "Add", "Sub", "Mul"})


def half_range_masks(graph: gs.Graph, lowest: float = -10_000.0) -> None:
    """Hide tokens by a number that half precision has.

    Exporters hide them by the lowest number of float32, or by minus infinity. An engine built in half precision makes
    infinities of the first, and one less the other is no number. Softmax gives nothing to either.
    """
    for node in graph.nodes:
        if node.op == "ConstantOfShape":
            _limit(node.attrs.get("value"), lowest)
        if node.op not in HIDING:
            continue
        for place, tensor in enumerate(node.inputs):
            if (values := _number(tensor)) is not None and values < lowest:
                name = f"{tensor.name}.half_range"
                node.inputs[place] = gs.Constant(name, np.full(values.shape, lowest, values.dtype))


def _number(tensor: gs.Tensor) -> Any:
    """The one number of a constant, however it is kept; None for all else."""
    if not isinstance(tensor, gs.Constant):
        makers = tensor.inputs
        if len(makers) != 1 or makers[0].op != "Constant":
            return None
        tensor = makers[0].attrs.get("value")
    if not isinstance(tensor, gs.Constant) or not _is_one_float(tensor):
        return None
    return tensor.values


def _limit(tensor: Any, lowest: float) -> None:
    if isinstance(tensor, gs.Constant) and _is_one_float(tensor) and tensor.values.item() < lowest:
        tensor.values = np.full(tensor.values.shape, lowest, tensor.values.dtype)


def _is_one_float(tensor: gs.Constant) -> bool:
    """Whether it is one float that numpy knows; bfloat16, which it does not, has the range of float32."""
    known = isinstance(tensor.dtype, np.dtype | type)
    return known and bool(np.prod(tensor.shape) == 1 and np.issubdtype(tensor.dtype, np.floating))
