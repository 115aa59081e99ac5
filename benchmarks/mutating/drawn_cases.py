"""Calls for models without stored ones: token ids at random, with the model's own outputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from verification.corpus import Case
from verification.drawn_inputs import input_for, random_ids, vocabulary_size
from verification.independent_verifier import NUMPY_TYPES

SIZES = ((1, 140), (2, 17))  # batch, tokens


def draw_cases(model: onnx.ModelProto, session: ort.InferenceSession) -> list[Case]:
    """Return calls with the outputs of the model; none if it takes anything but ids, masks and positions."""
    given = session.get_inputs()
    if any(len(one.shape) != 2 or np.dtype(NUMPY_TYPES.get(one.type, np.float32)).kind != "i" for one in given):
        return []
    cases = []
    for index, (batch, total) in enumerate(SIZES):
        ids = random_ids(batch, total, vocabulary_size(model))
        inputs = {one.name: input_for(one.name, ids).astype(NUMPY_TYPES[one.type]) for one in given}
        answer = np.asarray(session.run([session.get_outputs()[0].name], inputs)[0])
        if answer.ndim != 3 or answer.shape[:2] != (batch, total):
            return []
        real = np.ones((batch, total), np.bool_)
        cases.append(Case(index=index, inputs=inputs, reference=answer.astype(np.float32), real=real, total=total))
    return cases
