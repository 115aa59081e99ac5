"""Calls for models without stored ones: token ids at random, with the model's own outputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from verification.corpus import Case
from verification.drawn_inputs import input_for, random_ids, vocabulary_size
from verification.independent_verifier import NUMPY_TYPES
from verification.uncached import change

SIZES = ((1, 140), (2, 17))  # batch, tokens
STEADY = 1e-3  # of the spread: a smaller change with later tokens is a rounding error


def draw_cases(model: onnx.ModelProto, session: ort.InferenceSession) -> list[Case]:
    """Return calls with the outputs of the model; none if it takes anything but ids, masks and positions.

    A mask holds ones; zeros if the model changes with later tokens under ones alone, as one in which ones hide tokens.
    """
    given = session.get_inputs()
    if any(len(one.shape) != 2 or np.dtype(NUMPY_TYPES.get(one.type, np.float32)).kind != "i" for one in given):
        return []
    cases = _cases(model, session, visible=1)
    if cases and any("mask" in one.name for one in given) and change(session, cases[0]) > STEADY:
        others = _cases(model, session, visible=0)
        if others and change(session, others[0]) <= STEADY:
            return others
    return cases


def _cases(model: onnx.ModelProto, session: ort.InferenceSession, *, visible: int) -> list[Case]:
    cases = []
    for index, (batch, total) in enumerate(SIZES):
        ids = random_ids(batch, total, vocabulary_size(model))
        inputs = {
            one.name: (input_for(one.name, ids) * (visible if "mask" in one.name else 1)).astype(NUMPY_TYPES[one.type])
            for one in session.get_inputs()
        }
        answer = np.asarray(session.run([session.get_outputs()[0].name], inputs)[0])
        if answer.ndim != 3 or answer.shape[:2] != (batch, total):
            return []
        real = np.ones((batch, total), np.bool_)
        cases.append(Case(index=index, inputs=inputs, reference=answer.astype(np.float32), real=real, total=total))
    return cases
