"""What becomes of one mutant: it is run without a cache, injected, and run with one."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import onnx
import onnxruntime as ort
from corpus import Case, Entry
from second_judge import DYNAMIC, ContractError, Score, bound_of, failures, judge, open_session, read_contract

import kvsurgeon
from kvsurgeon.errors import KvsurgeonError, PassError

CATEGORIES = ("right", "wrong", "refused", "not runnable", "traceback", "hang", "died")
BAD = frozenset({"wrong", "traceback", "hang", "died"})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one mutant."""

    number: int
    model: str
    mutation: str
    recipe: str = ""  # what was done, and where
    category: str = "not runnable"
    reason: str = ""


class NotRunnableError(Exception):
    """The mutant itself does not run, or gives nothing to compare with."""


def try_mutant(outcome: Outcome, entry: Entry, mutant: onnx.ModelProto) -> Outcome:
    """Return what became of a mutant of a model."""
    try:
        injected: onnx.ModelProto | None = _injected(mutant, entry.folder)
    except KvsurgeonError as error:
        if isinstance(error, PassError) and not isinstance(error.__cause__, KvsurgeonError):
            return replace(outcome, category="traceback", reason=_where(error.__cause__ or error))
        return _refused(outcome, entry, mutant, error)
    except Exception as error:
        return replace(outcome, category="traceback", reason=_where(error))
    try:
        cases = answered(entry, mutant)
    except NotRunnableError as error:
        return replace(outcome, category="not runnable", reason=str(error))
    assert injected is not None
    return _judged(outcome, entry, mutant, injected, cases)


def _injected(mutant: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    copy = onnx.ModelProto.FromString(mutant.SerializeToString())
    return kvsurgeon.KeyValueCacheInjector(folder).apply(copy)


def _refused(outcome: Outcome, entry: Entry, mutant: onnx.ModelProto, error: KvsurgeonError) -> Outcome:
    """A refusal counts where the mutant runs; it is one line long."""
    if "\n" in str(error):
        return replace(outcome, category="traceback", reason=f"a message of several lines: {error}")
    try:
        answered(entry, mutant, quick=True)
    except NotRunnableError as why:
        return replace(outcome, category="not runnable", reason=f"{why}; refused: {error}")
    return replace(outcome, category="refused", reason=f"{type(error).__name__}: {error}")


def answered(entry: Entry, mutant: onnx.ModelProto, *, quick: bool = False) -> list[Case]:
    """Return the stored calls with what the mutant itself answers, whole and without a cache.

    Raises:
        NotRunnableError: It does not run, not twice alike, not at another length, or gives numbers that are none.
    """
    try:
        session = open_session(mutant, entry.folder)
        stored = entry.cases(mutant)
    except Exception as error:
        raise NotRunnableError(_one_line(error)) from error
    cases = []
    for case in stored[: 1 if quick else None]:
        try:
            answer = _run(session, case)
        except Exception as error:
            raise NotRunnableError(_one_line(error)) from error
        if answer.ndim < 2 or answer.shape[:2] != case.reference.shape[:2]:
            raise NotRunnableError(f"its answer has shape {list(answer.shape)}")
        if not np.isfinite(answer[case.real]).all():
            raise NotRunnableError("its answer is not finite")
        cases.append(replace(case, reference=answer))
    if not cases:
        raise NotRunnableError("nothing is stored to run it with")
    if not quick:
        _check_again(session, cases[0])
    return cases


def _check_again(session: ort.InferenceSession, case: Case) -> None:
    """A mutant that is drawn anew at each call, or fits one length only, says nothing about a cache."""
    if not np.array_equal(_run(session, case)[case.real], case.reference[case.real]):
        raise NotRunnableError("its answer differs from call to call")
    fixed = all(isinstance(size, int) for value in session.get_inputs() for size in value.shape)
    for total in () if fixed else (1, 2, 11, case.total - 1):
        try:
            _run(session, _cut(case, total))
        except Exception as error:
            raise NotRunnableError(f"at length {total}: {_one_line(error)}") from error


def _cut(case: Case, total: int) -> Case:
    """Return the first tokens of a case."""

    def first(array: np.ndarray) -> np.ndarray:
        picks = [slice(total if axis and size == case.total else None) for axis, size in enumerate(array.shape)]
        return array[tuple(picks)]

    inputs = {name: first(array) for name, array in case.inputs.items()}
    return replace(
        case, inputs=inputs, reference=case.reference[:, :total], real=case.real[:, :total], total=total
    )  # fmt: skip


def _run(session: ort.InferenceSession, case: Case) -> np.ndarray:
    feeds = {given.name: case.inputs[given.name] for given in session.get_inputs()}
    return np.asarray(session.run([session.get_outputs()[0].name], feeds)[0]).astype(np.float32)


def _judged(
    outcome: Outcome, entry: Entry, mutant: onnx.ModelProto, injected: onnx.ModelProto, cases: list[Case]
) -> Outcome:
    bound = bound_of(mutant)
    try:
        session = open_session(injected, entry.folder)
        contract = read_contract(session, mutant)
        scores = [score for case in cases for score in judge(session, contract, case)]
    except ContractError as error:
        return replace(outcome, category="wrong", reason=str(error))
    except Exception as error:
        return replace(outcome, category="wrong", reason=f"injected, it does not run: {_one_line(error)}")
    failed = failures(scores, bound)
    worst = max(failed or scores, key=lambda score: score.error)
    reason = f"{worst.way}, case {worst.case}: error {worst.error:.2g}, worst at position {worst.position}"
    if not failed:
        return replace(outcome, category="right", reason=reason)
    noise = _noise(entry, mutant, cases)
    if worst.error <= 30 * noise:
        return replace(outcome, category="not runnable", reason=f"its own rounding is {noise:.2g}; {reason}")
    if bound is DYNAMIC and _changes(entry, mutant, cases, worst) > 0.05:
        return replace(outcome, category="not runnable", reason=f"its ranges are those of a call; {reason}")
    return replace(outcome, category="wrong", reason=f"{reason}; {_consistency(entry, mutant, cases, worst)}")


def _noise(entry: Entry, mutant: onnx.ModelProto, cases: list[Case]) -> float:
    """How far two ways of computing the mutant are apart: with and without onnxruntime's optimisations."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(entry.folder))
    session = ort.InferenceSession(mutant.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return max(_distance(_run(session, case), case) for case in cases)


def _consistency(entry: Entry, mutant: onnx.ModelProto, cases: list[Case], worst: Score) -> str:
    """Whether the mutant itself says the same of a token whatever follows: no cache can help where it does not."""
    change = _changes(entry, mutant, cases, worst)
    if np.isnan(change):
        return "not run at other lengths"
    if change > 1e-3:
        return f"the mutant itself changes by {change:.2g} with what follows"
    return "the mutant itself is prefix-consistent"


def _changes(entry: Entry, mutant: onnx.ModelProto, cases: list[Case], worst: Score) -> float:
    """How much what the mutant says of a token changes with the tokens that follow; nan where that cannot be seen."""
    case = next(case for case in cases if case.index == worst.case)
    if case.last_only:
        return float("nan")
    session = open_session(mutant, entry.folder)
    try:
        return max(_distance(_run(session, cut := _cut(case, total)), cut) for total in (1, 5, 11, 16))
    except Exception:
        return float("nan")


def _distance(answer: np.ndarray, case: Case) -> float:
    found, reference = answer[case.real], case.reference[case.real]
    if not found.size:
        return 0.0
    return float(np.abs(found - reference).max() / (float(np.ptp(reference)) or 1.0))


def seeded(seed: int, number: int) -> Random:
    """Return the numbers that one mutant is drawn with, whichever others are made."""
    return Random(f"{seed}/{number}")


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "kvsurgeon" in Path(frame.filename).parts]
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in [*own[-2:], *frames[-1:]]]
    return f"{type(error).__name__}: {_one_line(error)[:160]} in " + " > ".join(dict.fromkeys(places))


def _one_line(error: BaseException) -> str:
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/\S+ ", "", str(error))
    return " ".join(text.split())[:300]
