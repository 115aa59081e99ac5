"""Calls for models without stored ones: token ids at random, with the model's own outputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from verification.corpus import Case
from verification.independent_verifier import NUMPY_TYPES

SIZES = ((1, 140), (2, 17))  # batch, tokens
FEW = 60  # token ids, if the vocabulary is unknown


def draw_cases(model: onnx.ModelProto, session: ort.InferenceSession) -> list[Case]:
    """Return calls with the outputs of the model; none if it takes anything but ids, masks and positions."""
    given = session.get_inputs()
    if any(len(one.shape) != 2 or np.dtype(NUMPY_TYPES.get(one.type, np.float32)).kind != "i" for one in given):
        return []
    cases = []
    for index, (batch, total) in enumerate(SIZES):
        inputs = {
            one.name: _drawn(one.name, batch, total, _vocabulary(model)).astype(NUMPY_TYPES[one.type]) for one in given
        }
        answer = np.asarray(session.run([session.get_outputs()[0].name], inputs)[0])
        if answer.ndim != 3 or answer.shape[:2] != (batch, total):
            return []
        real = np.ones((batch, total), np.bool_)
        cases.append(Case(index=index, inputs=inputs, reference=answer.astype(np.float32), real=real, total=total))
    return cases


def _drawn(name: str, batch: int, total: int, vocabulary: int) -> np.ndarray:
    if "mask" in name:
        return np.ones((batch, total))
    if "position" in name:
        return np.broadcast_to(np.arange(total), (batch, total))
    return np.random.default_rng(batch).integers(0, vocabulary, (batch, total))


def _vocabulary(model: onnx.ModelProto) -> int:
    """Return the number of rows of the table that an input picks from."""
    inputs = {value.name for value in model.graph.input}
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 2}
    tables = [node.input[0] for node in model.graph.node if node.op_type == "Gather" and node.input[1] in inputs]
    return min((int(rows[name]) for name in tables if name in rows), default=FEW)
