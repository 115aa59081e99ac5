"""Run one mutant without a cache, inject it, and run it with one."""

from __future__ import annotations

import re
import shutil
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime as ort
from verification.corpus import Case, Entry
from verification.independent_verifier import (
    DYNAMIC,
    EXACT,
    Bound,
    ContractError,
    bound_of,
    failures,
    is_rounded,
    open_session,
    read_contract,
    score_case,
)
from verification.uncached import LEVELS, Level, answer, change, distance, first_tokens, steady
from verification.unquantized import without_dynamic_ranges

import kvsurgeon
import kvsurgeon.io
from kvsurgeon.errors import InternalError, KvsurgeonError, PassError
from mutating.drawn_cases import draw_cases

CATEGORIES = ("right", "wrong", "refused", "not runnable", "traceback", "hang", "died")
BAD = frozenset({"wrong", "traceback", "hang", "died"})
LARGEST_WEIGHT = 1e6  # of a damaged model: scores of a larger one are beyond any mask that is added to them


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one mutant."""

    number: int
    model: str
    mutation: str
    recipe: str = ""  # what was done, and where
    category: str = "not runnable"
    reason: str = ""


Notify = Callable[[Outcome], None]


def ignore(_: Outcome) -> None:
    """Hear what becomes of a mutant, and do nothing about it."""


class NotRunnableError(Exception):
    """The mutant itself does not run, or gives nothing to compare with."""


def try_mutant(outcome: Outcome, entry: Entry, mutant: onnx.ModelProto, notify: Notify = ignore) -> Outcome:
    """Return what became of a mutant of a model; `notify` gets the provisional outcome before each step."""
    alone = replace(outcome, category="not runnable", reason="onnxruntime did not survive it, or not in time")
    try:
        injected, hiding = _injected(mutant, entry.folder)
    except Exception as error:
        unmeant = _unmeant(error)
        notify(alone)
        return (
            replace(outcome, category="traceback", reason=unmeant)
            if unmeant
            else _refused(outcome, entry, mutant, error)
        )
    notify(alone)
    try:
        level, cases = answered(entry, mutant)
    except NotRunnableError as error:
        return replace(outcome, category="not runnable", reason=str(error))
    notify(replace(outcome, category="hang"))
    if hiding and hiding != _injected(onnx.load(entry.path), entry.folder)[1]:
        reason = "a note says that its masks hide the tokens that the stored ones keep"
        return replace(outcome, category="not runnable", reason=reason)
    return _verified(outcome, entry, mutant, injected, level, cases)


def try_file(outcome: Outcome, entry: Entry, data: bytes, notify: Notify = ignore) -> Outcome:
    """Return what became of a damaged file: what cannot be read is refused, what can is a mutant like others."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(data)
        for side_file in entry.folder.iterdir():
            if side_file.name != path.name and side_file.is_file():
                shutil.copy(side_file, folder)
        try:
            kvsurgeon.io.load(path)
        except Exception as error:
            unmeant = _unmeant(error)
            category, reason = ("traceback", unmeant) if unmeant else ("refused", f"{type(error).__name__}: {error}")
            return replace(outcome, category=category, reason=reason)
    try:
        mutant = onnx.load_model_from_string(data)
    except Exception as error:
        return replace(outcome, category="not runnable", reason=_one_line(error))
    return try_mutant(outcome, entry, mutant, notify)


def _unmeant(error: Exception) -> str:
    """Return where an unexpected exception was raised; empty for a deliberate error of one line."""
    if not isinstance(error, KvsurgeonError):
        return _where(error)
    if isinstance(error, InternalError):
        return _where(error.cause)
    if isinstance(error, PassError) and not isinstance(error.__cause__, KvsurgeonError):
        return _where(error.__cause__ or error)
    return f"a message of several lines: {error}" if "\n" in str(error) else ""


def _injected(mutant: onnx.ModelProto, folder: Path) -> tuple[onnx.ModelProto, frozenset[str]]:
    """Return the injected mutant, and the notes on masks that hide the tokens that they mark."""
    copy = onnx.ModelProto.FromString(mutant.SerializeToString())
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        injected = kvsurgeon.KeyValueCacheInjector(folder).apply(copy)
    notes = (str(one.message) for one in issued)
    return injected, frozenset(note for note in notes if "hides the tokens that it marks" in note)


def _refused(outcome: Outcome, entry: Entry, mutant: onnx.ModelProto, error: Exception) -> Outcome:
    """A refusal counts where the mutant runs."""
    try:
        answered(entry, mutant, quick=True)
    except NotRunnableError as why:
        return replace(outcome, category="not runnable", reason=f"{why}; refused: {error}")
    return replace(outcome, category="refused", reason=f"{type(error).__name__}: {error}")


def answered(entry: Entry, mutant: onnx.ModelProto, *, quick: bool = False) -> tuple[Level, list[Case]]:
    """Return the stored calls with what the mutant itself answers, and how far onnxruntime may rewrite it for that.

    Raises:
        NotRunnableError: It does not run as it is written, not twice alike, not at another length, or gives numbers
            that are none.
    """
    try:
        session = open_session(mutant, entry.folder)
        stored = entry.cases(mutant) or draw_cases(mutant, session)
    except Exception as error:
        raise NotRunnableError(_one_line(error)) from error
    cases = [_answered(session, case) for case in stored[: 1 if quick else None]]
    if not cases:
        raise NotRunnableError("nothing is stored to run it with")
    if quick:
        return LEVELS[0], cases
    _check_again(session, cases[0])
    _check_names(entry, mutant, cases[0])
    _check_as_written(entry, mutant, cases[0])
    cases = [one for case in cases for one in _apart(session, case, bound_of(mutant))]
    return steady(mutant, entry.folder, cases, bound_of(mutant)) if is_rounded(mutant) else (LEVELS[0], cases)


def _answered(session: ort.InferenceSession, case: Case) -> Case:
    try:
        found = answer(session, case)
    except Exception as error:
        raise NotRunnableError(_one_line(error)) from error
    if found.ndim < 2 or found.shape[:2] != case.reference.shape[:2]:
        raise NotRunnableError(f"its answer has shape {list(found.shape)}")
    if not np.isfinite(found[case.real]).all():
        raise NotRunnableError("its answer is not finite")
    return replace(case, reference=found)


def _check_names(entry: Entry, mutant: onnx.ModelProto, case: Case) -> None:
    """A mutant that gives one name to axes of two sizes states what its inputs contradict."""
    original = onnx.load(entry.path, load_external_data=False)
    wrong = _names_of_two_sizes(mutant, case) - _names_of_two_sizes(original, case)
    if wrong:
        raise NotRunnableError(f"`{min(wrong)}` is the name of axes of two sizes")


def _names_of_two_sizes(model: onnx.ModelProto, case: Case) -> set[str]:
    sizes: dict[str, set[int]] = {}
    for value in model.graph.input:
        array = case.inputs.get(value.name)
        for dim, size in zip(value.type.tensor_type.shape.dim, () if array is None else array.shape, strict=False):
            if dim.dim_param:
                sizes.setdefault(dim.dim_param, set()).add(size)
    return {name for name, found in sizes.items() if len(found) > 1}


def _check_again(session: ort.InferenceSession, case: Case) -> None:
    """A mutant that is random at each call, or fits one length only, proves nothing about a cache."""
    if not np.array_equal(answer(session, case)[case.real], case.reference[case.real]):
        raise NotRunnableError("its answer differs from call to call")
    fixed = all(isinstance(size, int) for value in session.get_inputs() for size in value.shape)
    for total in () if fixed else (1, 2, 11, case.total - 1):
        try:
            answer(session, first_tokens(case, total))
        except Exception as error:
            raise NotRunnableError(f"at length {total}: {_one_line(error)}") from error


def _apart(session: ort.InferenceSession, case: Case, bound: Bound) -> list[Case]:
    """Return a case, or its sequences one by one where what is said of one depends on the others of its batch."""
    rows = [
        replace(case, inputs={name: array[row : row + 1] for name, array in case.inputs.items()},
                reference=case.reference[row : row + 1], real=case.real[row : row + 1])
        for row in range(case.batch)
    ]  # fmt: skip
    try:
        alone = [_answered(session, row) for row in rows]
    except NotRunnableError:  # its batch is fixed
        return [case]
    same = all(distance(one.reference, row) <= bound.error for one, row in zip(alone, rows, strict=True))
    return [case] if same else alone


def _check_as_written(entry: Entry, mutant: onnx.ModelProto, case: Case) -> None:
    """onnxruntime rewrites some graphs that break the rules of ONNX into others that do not."""
    try:
        answer(open_session(mutant, entry.folder, LEVELS[-1]), case)
    except Exception as error:
        raise NotRunnableError(f"as it is written, without optimization: {_one_line(error)}") from error


def _verified(
    outcome: Outcome, entry: Entry, mutant: onnx.ModelProto, injected: onnx.ModelProto, level: Level, cases: list[Case]
) -> Outcome:
    bound = bound_of(mutant)
    try:
        session = open_session(injected, entry.folder, level)
        contract = read_contract(session, mutant)
        scores = [score for case in cases for score in score_case(session, contract, case)]
    except ContractError as error:
        return replace(outcome, category="wrong", reason=str(error))
    except Exception as error:
        return replace(outcome, category="wrong", reason=f"injected, it does not run: {_one_line(error)}")
    failed = failures(scores, bound)
    worst = max(failed or scores, key=lambda score: score.error)
    reason = f"{worst.chunking}, case {worst.case}: error {worst.error:.2g}, worst at position {worst.position}"
    if not failed:
        return replace(outcome, category="right", reason=reason)
    noise = _noise(entry, mutant, cases)
    if worst.error <= 30 * noise:
        return replace(outcome, category="not runnable", reason=f"its own rounding is {noise:.2g}; {reason}")
    changed = change(open_session(mutant, entry.folder, level), next(c for c in cases if c.index == worst.case))
    if bound is DYNAMIC and (changed > 0.05 or _is_right_unquantized(entry, mutant, injected, cases)):
        return replace(outcome, category="not runnable", reason=f"its ranges are those of a call; {reason}")
    if changed > 1e-3 and (largest := _largest_weight(mutant)) > LARGEST_WEIGHT:
        reason = f"a weight of {largest:.2g} makes scores that outweigh its mask; {reason}"
        return replace(outcome, category="not runnable", reason=reason)
    said = f"the mutant itself changes by {changed:.2g} with what follows" if changed > 1e-3 else "the mutant is steady"
    return replace(outcome, category="wrong", reason=f"{reason}; {'not run shorter' if np.isnan(changed) else said}")


def _is_right_unquantized(entry: Entry, mutant: onnx.ModelProto, injected: onnx.ModelProto, cases: list[Case]) -> bool:
    """Whether an injected mutant is right if neither it nor the mutant rounds activations to ranges of a call."""
    exact, cached = without_dynamic_ranges(mutant), without_dynamic_ranges(injected)
    if exact is None or cached is None:
        return False
    alone, session = open_session(exact, entry.folder), open_session(cached, entry.folder)
    contract = read_contract(session, exact)
    scores = [score for case in cases for score in score_case(session, contract, _answered(alone, case))]
    return not failures(scores, EXACT)


def _largest_weight(model: onnx.ModelProto) -> float:
    """Largest magnitude of the matrices of weights."""
    weights = (one for one in model.graph.initializer if len(one.dims) == 2 and not one.external_data)
    floats = (array for one in weights if (array := onnx.numpy_helper.to_array(one)).dtype.kind == "f")
    return max((float(np.abs(np.nan_to_num(array)).max(initial=0.0)) for array in floats), default=0.0)


def _noise(entry: Entry, mutant: onnx.ModelProto, cases: list[Case]) -> float:
    """Difference between computations of a mutant that should agree.

    Without onnxruntime's optimizations; and with weights that differ by a rounding error, as sums in another order do.
    """
    sessions = [open_session(mutant, entry.folder, LEVELS[-1])]
    sessions += [open_session(_jittered(mutant, seed), entry.folder) for seed in range(2)]
    return max(distance(answer(session, case), case) for session in sessions for case in cases)


def _jittered(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """Return a model whose weights are off by a rounding error of float32."""
    random = np.random.default_rng(seed)
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in copy.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.data_location != onnx.TensorProto.EXTERNAL:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float64)
            error = random.uniform(-1, 1, array.shape) * np.finfo(np.float32).eps
            tensor.CopyFrom(onnx.numpy_helper.from_array((array * (1 + error)).astype(np.float32), tensor.name))
    return copy


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
