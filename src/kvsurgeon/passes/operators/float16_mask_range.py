"""Raise masks to the range of float16. Written with onnx-graphsurgeon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from kvsurgeon.errors import Code, UnsupportedError, UsageError
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import names_with

# Operators that mask scores by a constant: as an alternative, as a bias, or as the factor of a mask of 0 and 1. A bound
# of `Clip` or `Max` is no mask.
MASKING = frozenset({"Where", "Add", "Sub", "Mul"})
LAYOUT = names_with(Trait.IDENTITY, Trait.REPEAT, Trait.RESHAPE, Trait.SELECT, Trait.TRANSPOSE) | {"Trilu"}
RANGE = (-65_504.0, -100.0)  # from the lowest float16 to a score that softmax still gives no weight


def float16_mask_range(graph: gs.Graph, minimum: float = -10_000.0) -> None:
    """Raise masks to the range of float16.

    Before: scores are masked by the lowest float32 or by minus infinity, and an engine in float16 computes infinities
    and NaN of them. After: by `minimum`. Softmax gives masked keys no weight in both cases.

    Not handled: masks that are quantized with a scale larger than `minimum`.

    Args:
        graph: Graph of the model.
        minimum: Lower bound of masks.
    """
    if not RANGE[0] <= minimum <= RANGE[1]:
        expected = " to ".join(f"{bound:g}" for bound in RANGE)
        raise UsageError(f"option minimum: expected a number from {expected}, the range of float16, found {minimum}")
    masks = _masks_below(graph, minimum)
    for node, _, _ in masks:
        _check_quantization(node, minimum)
    for node, place, values in masks:
        raised = np.asarray(np.maximum(values, values.dtype.type(minimum)))
        if isinstance(place, str):
            node.attrs[place].values = raised
        else:
            node.inputs[place] = gs.Constant(f"{node.inputs[place].name}.half_range", raised)


def _masks_below(graph: gs.Graph, minimum: float) -> list[tuple[gs.Node, int | str, np.ndarray]]:
    """Return each mask with a lower element: the node that reads it, the input or attribute, and the elements."""
    masks: dict[tuple[int, int | str], tuple[gs.Node, int | str, np.ndarray]] = {}
    for node in graph.nodes:
        places: list[tuple[gs.Node, int | str]] = [(node, "value")] if node.op == "ConstantOfShape" else []
        if node.op in MASKING:
            places += [found for place in range(len(node.inputs)) for found in _constant_inputs(node, place)]
        for reader, place in places:
            tensor = reader.attrs.get(place) if isinstance(place, str) else _constant(reader.inputs[place])
            values = _mask(tensor)
            if values is not None and bool(values.min() < minimum):
                masks.setdefault((id(reader), place), (reader, place, values))
    return list(masks.values())


def _constant_inputs(node: gs.Node, place: int) -> Iterator[tuple[gs.Node, int]]:
    """Yield the node and input at which the constant is read that an input is a view of."""
    tensor = node.inputs[place]
    while _constant(tensor) is None:
        if len(tensor.inputs) != 1 or tensor.inputs[0].op not in LAYOUT:
            return
        node, place = tensor.inputs[0], 0
        tensor = node.inputs[place]
    yield node, place


def _constant(tensor: gs.Tensor) -> gs.Constant | None:
    """Return the constant of an initializer or of a `Constant` node; None for other tensors."""
    if isinstance(tensor, gs.Constant):
        return tensor
    producers = tensor.inputs
    value = producers[0].attrs.get("value") if len(producers) == 1 and producers[0].op == "Constant" else None
    return value if isinstance(value, gs.Constant) else None


def _mask(tensor: Any) -> np.ndarray | None:
    """Return the elements of a float scalar or square matrix; None for bfloat16, which has the range of float32."""
    if not isinstance(tensor, gs.Constant) or not isinstance(tensor.dtype, np.dtype | type):
        return None
    shape = tuple(tensor.shape)
    is_mask = int(np.prod(shape)) == 1 or (len(shape) > 1 and shape[-1] == shape[-2] > 0)
    return np.asarray(tensor.values) if is_mask and np.issubdtype(tensor.dtype, np.floating) else None


def _check_quantization(node: gs.Node, minimum: float) -> None:
    """Check that quantization between a mask and softmax does not round `minimum` to 0.

    Raises:
        UnsupportedError: The scale is too large, as for the lowest float32.
    """
    pending, visited = [node], set()
    while pending:
        node = pending.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        if node.op == "QuantizeLinear":
            scale = _constant(node.inputs[1])
            if scale is None or np.max(np.abs(scale.values)) > abs(minimum):
                raise UnsupportedError(
                    "the quantization of a mask would round its new minimum to 0", code=Code.PASS_PRECONDITION,
                    at=node.outputs[0].name, expected=f"a scale of at most {abs(minimum):g}",
                    found="a scale that is not constant" if scale is None else f"a scale of {np.max(scale.values):g}",
                    hint="quantize the model without its masks",
                )  # fmt: skip
        if node.op in MASKING | LAYOUT | {"ConstantOfShape", "DequantizeLinear"}:
            pending += [reader for output in node.outputs for reader in output.outputs]
