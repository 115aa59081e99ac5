"""Lengths after which a model may compute something else: numbers that its graph compares with, and named ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from kvsurgeon.parity.model_source import all_nodes
from kvsurgeon.parity.reference_model import ReferenceModel
from kvsurgeon.parity.scenarios import AFTER, Effort

_COMPARED = {"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "Min", "Max", "Clip", "Mod"}
_LARGEST: dict[Effort, int] = {"quick": 0, "normal": 1100, "thorough": 8200}  # tokens
_WORK: dict[Effort, int] = {"quick": 0, "normal": 2**34, "thorough": 2**40}  # tokens times parameters of a text
_MOST: dict[Effort, int] = {"quick": 0, "normal": 3, "thorough": 12}  # thresholds


def thresholds_in(model: onnx.ModelProto) -> frozenset[int]:
    """Return the positive integers that a model compares a number with."""
    nodes = all_nodes(model)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants |= {node.output[0]: attribute.t for node in nodes if node.op_type == "Constant"
                  for attribute in node.attribute if attribute.name == "value"}  # fmt: skip
    for node in nodes:  # the usual conversions of a constant
        if node.op_type in ("Cast", "Identity", "Unsqueeze", "Squeeze") and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    named = {name for node in nodes if node.op_type in _COMPARED for name in node.input}
    return frozenset(value for name in named & constants.keys() for value in _lengths(constants[name]))


def reached(
    thresholds: Iterable[int], reference: ReferenceModel, effort: Effort, model: onnx.ModelProto
) -> tuple[int, ...]:
    """Return the thresholds that an effort allows texts for, and that no other text passes.

    If the models take texts up to a limit, the last one is such that its text has as many tokens.

    Args:
        thresholds: All thresholds.
        reference: The reference model, with the sizes of the texts.
        effort: How many scenarios.
        model: A model, for the number of its parameters.
    """
    lengths = reference.lengths
    parameters = sum(int(np.prod(tensor.dims, dtype=np.int64)) for tensor in model.graph.initializer)
    most = min(_LARGEST[effort], _WORK[effort] // max(parameters, 1))
    named = set(thresholds)
    if reference.longest is not None:
        most = min(most, reference.longest - AFTER)
        if reference.longest > lengths.long:
            named.add(reference.longest - AFTER)
    fits = _apart(one for one in named if 2 * lengths.long // 3 - 4 < one <= most)
    return tuple(fits[-_MOST[effort] :] if _MOST[effort] else ())


def _apart(thresholds: Iterable[int]) -> list[int]:
    """Return thresholds in ascending order, without those that the text of the one before passes."""
    found: list[int] = []
    for threshold in sorted(thresholds):
        if not found or threshold > found[-1] + AFTER // 2:
            found.append(threshold)
    return found


def _lengths(tensor: onnx.TensorProto) -> Iterator[int]:
    if tensor.external_data or int(np.prod(tensor.dims, dtype=np.int64)) > 4:
        return
    if tensor.data_type in (onnx.TensorProto.STRING, onnx.TensorProto.BOOL):
        return
    for value in numpy_helper.to_array(tensor).reshape(-1).astype(np.float64):
        if 1 < value < 2**20 and value == int(value):
            yield int(value)
