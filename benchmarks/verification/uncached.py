"""A reference model without a cache: its outputs for a case, and whether it agrees with itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from verification.corpus import Case
from verification.independent_verifier import Bound, open_session

Level = ort.GraphOptimizationLevel
LEVELS = (Level.ORT_ENABLE_ALL, Level.ORT_ENABLE_BASIC, Level.ORT_DISABLE_ALL)

PREFIXES = (1, 2, 5, 11, 16)  # tokens


def answer(session: ort.InferenceSession, case: Case) -> np.ndarray:
    """Return the first output for a case, in float32."""
    feeds = {given.name: case.inputs[given.name] for given in session.get_inputs()}
    return np.asarray(session.run([session.get_outputs()[0].name], feeds)[0]).astype(np.float32)


def first_tokens(case: Case, total: int) -> Case:
    """Return the first tokens of a case that has an answer for each."""

    def first(array: np.ndarray) -> np.ndarray:
        picks = [slice(total if axis and size == case.total else None) for axis, size in enumerate(array.shape)]
        return array[tuple(picks)]

    return replace(
        case,
        inputs={name: first(array) for name, array in case.inputs.items()},
        reference=case.reference[:, :total],
        real=case.real[:, :total],
        total=total,
    )


def distance(found: np.ndarray, case: Case) -> float:
    """Return the largest difference over the spread of what a case holds, where tokens count."""
    found, reference = found[case.real], case.reference[case.real]
    if not found.size:
        return 0.0
    return float(np.abs(found - reference).max() / (float(np.ptp(reference)) or 1.0))


def change(session: ort.InferenceSession, case: Case) -> float:
    """Return how much the output for a token changes with the tokens that follow; nan if that cannot be measured."""
    if case.last_only:
        return float("nan")
    try:
        return max(distance(answer(session, cut := first_tokens(case, total)), cut) for total in PREFIXES)
    except Exception:  # its length is fixed
        return float("nan")


def highest_level(model: onnx.ModelProto, folder: Path) -> Level:
    """Return how far onnxruntime may rewrite a model without breaking it; as far as it likes where nothing helps."""
    for level in LEVELS:
        try:
            open_session(model, folder, level)
        except Exception:
            continue
        return level
    return LEVELS[0]


def steady(model: onnx.ModelProto, folder: Path, cases: Sequence[Case], bound: Bound) -> tuple[Level, list[Case]]:
    """Return how far onnxruntime may rewrite a model that is right to the bound, and the cases as it answers them then.

    Some optimizations make a quantized model say other things of the same tokens in a shorter call. Where it does not
    agree with itself without them either, it is its own doing, and the cases stay as they are.
    """
    for level in LEVELS:
        session = open_session(model, folder, level)
        heard = [replace(case, reference=answer(session, case)) for case in cases]
        if all(not change(session, case) > bound.error for case in heard):
            return level, list(cases) if level is LEVELS[0] else heard
    return LEVELS[0], list(cases)
