"""Keep the numbers that hide tokens within the range of half precision. Written with onnx-graphsurgeon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from kvsurgeon.errors import UnsupportedError, UsageError

# Where such a number is one of two to choose from, is added to scores, or multiplied with a mask of 0 and 1.
# A bound of `Clip` or `Max` is none of these, and stays.
HIDING = frozenset({"Where", "Add", "Sub", "Mul"})
HALF_RANGE = (-65_504.0, -100.0)  # what half precision has, and what still leaves a token no weight
VIEWS = frozenset({"Cast", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Trilu", "Unsqueeze"})


def float16_mask_range(graph: gs.Graph, lowest: float = -10_000.0) -> None:
    """Hide tokens by a number that half precision has.

    Exporters hide them by the lowest number of float32, or by minus infinity. An engine built in half precision makes
    infinities of the first, and one less the other is no number. Softmax gives nothing to either.

    Not handled: a mask that is rounded to steps so wide that the new number is none of them.

    Args:
        graph: Of the model.
        lowest: The number to hide them by.
    """
    if not HALF_RANGE[0] <= lowest <= HALF_RANGE[1]:
        expected = " to ".join(f"{bound:g}" for bound in HALF_RANGE)
        raise UsageError(f"option lowest: expected a number from {expected}, which half precision has, found {lowest}")
    hiding = list(_hiding(graph, lowest))
    for node, _, _ in hiding:
        _check_kept(node, lowest)
    for node, place, values in hiding:
        limited = np.asarray(np.maximum(values, values.dtype.type(lowest)))
        if isinstance(place, str):
            node.attrs[place].values = limited
        else:
            node.inputs[place] = gs.Constant(f"{node.inputs[place].name}.half_range", limited)


def _hiding(graph: gs.Graph, lowest: float) -> Iterator[tuple[gs.Node, int | str, np.ndarray]]:
    """The nodes that read a number which is too low, at which input or attribute, and the numbers there."""
    seen: set[tuple[int, int | str]] = set()
    for node in graph.nodes:
        places: list[tuple[int | str, gs.Node]] = [("value", node)] if node.op == "ConstantOfShape" else []
        if node.op in HIDING:
            places += [found for place in range(len(node.inputs)) for found in _source(node, place)]
        for place, reader in places:
            tensor = reader.attrs.get(place) if isinstance(place, str) else _constant(reader.inputs[place])
            key = (id(reader), place)
            numbers = _mask(tensor)
            if key not in seen and numbers is not None and bool(numbers.min() < lowest):
                seen.add(key)
                yield reader, place, numbers


def _source(node: gs.Node, place: int) -> Iterator[tuple[int, gs.Node]]:
    """Where a constant is read that an input is, or is a view of."""
    tensor = node.inputs[place]
    while _constant(tensor) is None:
        if len(tensor.inputs) != 1 or tensor.inputs[0].op not in VIEWS:
            return
        node, place = tensor.inputs[0], 0
        tensor = node.inputs[place]
    yield place, node


def _constant(tensor: gs.Tensor) -> gs.Constant | None:
    """The constant that a tensor is, however it is kept."""
    if isinstance(tensor, gs.Constant):
        return tensor
    makers = tensor.inputs
    value = makers[0].attrs.get("value") if len(makers) == 1 and makers[0].op == "Constant" else None
    return value if isinstance(value, gs.Constant) else None


def _mask(tensor: Any) -> np.ndarray | None:
    """One float, or one for each pair of tokens; bfloat16 has the range of float32, and stays."""
    if not isinstance(tensor, gs.Constant) or not isinstance(tensor.dtype, np.dtype | type):
        return None
    shape = tuple(tensor.shape)
    alike = int(np.prod(shape)) == 1 or (len(shape) > 1 and shape[-1] == shape[-2] > 0)
    return np.asarray(tensor.values) if alike and np.issubdtype(tensor.dtype, np.floating) else None


def _check_kept(node: gs.Node, lowest: float) -> None:
    """Hold that nothing rounds the new number away before softmax reads it.

    Raises:
        UnsupportedError: It is quantised, in steps that were made for the lowest number of float32.
    """
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.op == "QuantizeLinear":
            scale = _constant(node.inputs[1])
            if scale is None or np.max(np.abs(scale.values)) > abs(lowest):
                raise UnsupportedError(
                    "a mask is quantised, and the number that would hide tokens be rounded to 0",
                    at=node.outputs[0].name,
                    expected=f"steps of at most {abs(lowest):g}",
                    found="steps that are not constant" if scale is None else f"steps of {np.max(scale.values):g}",
                    hint="quantise the model without its masks",
                )  # fmt: skip
        if node.op in HIDING | VIEWS | {"ConstantOfShape", "DequantizeLinear"}:
            pending += [reader for made in node.outputs for reader in made.outputs]
