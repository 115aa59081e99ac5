"""Injects a model and compares it, chunk by chunk, with the original on the same text so far.

Shares no code with kvsurgeon: the injected model is known by its inputs and outputs.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from verification.independent_verifier import (
    BATCH,
    NEW,
    NUMPY_TYPES,
    PAST,
    TOTALS,
    ContractError,
    bound_of,
    empty_sizes,
    read_contract,
)

import kvsurgeon
from adversarial_models.decoder import ORDINARY_TOKENS, VOCABULARY
from kvsurgeon.errors import KvsurgeonError, ParityError, PassError

RIGHT, REFUSED, CAUGHT, LIMITED = "right", "refused", "caught", "limited"
WRONG, CRASH, HANG, NOT_COMPARED = "WRONG", "crash", "hang", "not compared"
VERDICTS = (RIGHT, LIMITED, REFUSED, CAUGHT, WRONG, CRASH, HANG, NOT_COMPARED)
BAD = frozenset({WRONG, CRASH, HANG})

SECONDS_TO_INJECT = 60
SWEEP_LENGTHS = (65, 130, 514, 1026, 2049, 4000)  # tokens
SCORE_ELEMENTS = 64e6  # heads * length ** 2 of one tensor of scores


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `inject` made of a model."""

    verdict: str
    reason: str = ""
    at: int | None = None  # total length at which it stops, or is wrong
    changes: bool | None = None  # whether the original's outputs change with later tokens; None if not compared


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """Calls on one text, each with the cache of those before: total length after each, and whether it is compared."""

    batch: int
    steps: tuple[tuple[int, bool], ...]


def chunkings(threshold: int | None, longest: int) -> list[Chunking]:
    """Return the calls for a model that may change at a threshold."""
    near = [] if threshold is None else [threshold + more for more in (-1, 0, 1, 2, 40) if threshold + more > 6]
    compared = {5, 64, *SWEEP_LENGTHS, *near, *(one - 1 for one in SWEEP_LENGTHS if one < 600)}
    silent = {one - 1 for one in SWEEP_LENGTHS if one >= 600} - compared
    steps = [(one, one in compared) for one in sorted(compared | silent) if one <= longest]
    start = max((threshold or 0) + 2, 40)
    at_once = [(start + more, True) for more in (0, 1, 4, 5) if start + more <= longest]
    both = {3, 17, 18, 40, 65, *(one for one in near if one < 1100)}
    result = [
        Chunking(batch=1, steps=tuple(steps)),
        Chunking(batch=2, steps=tuple((one, True) for one in sorted(both))),
    ]
    result.append(Chunking(batch=3, steps=((3, True), (4, True), (17, True), (18, True))))
    if at_once and start > 45:
        result.append(Chunking(batch=1, steps=tuple(at_once)))
    return result


def evaluate(
    path: Path, *, threshold: int | None, heads: int, through: str, work: Path, lengths: Sequence[int] = ()
) -> Verdict:
    """Return what `inject` makes of a model."""
    start = time.perf_counter()
    try:
        injected = inject(path, through, work)
    except NotInjectedError as verdicted:
        return verdicted.verdict
    if time.perf_counter() - start > SECONDS_TO_INJECT:
        return Verdict(verdict=HANG, reason=f"injected in {time.perf_counter() - start:.0f} s")
    original = onnx.load(path, load_external_data=False)
    longest = max(min(4000, int((SCORE_ELEMENTS / heads) ** 0.5)), (threshold or 0) + 45)
    try:
        reference = Reference(path)
    except OriginalNotRunnableError as error:
        return Verdict(verdict=NOT_COMPARED, reason=str(error))
    try:
        candidate = Candidate(injected, original)
    except (ContractError, Exception) as error:
        return Verdict(verdict=WRONG, reason=f"cannot be run: {_one_line(error)}")
    return compare(reference, candidate, [*chunkings(threshold, longest), *chunkings_around(lengths, longest)])


def chunkings_around(lengths: Sequence[int], longest: int) -> Iterator[Chunking]:
    """Yield calls on both sides of each length."""
    near = sorted({one + more for one in lengths for more in (-1, 0, 1, 2) if 6 < one + more <= longest})
    if near:
        yield Chunking(batch=1, steps=tuple((one, True) for one in near))


class NotInjectedError(Exception):
    """No model was written: the verdict is given before anything is compared."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.reason)
        self.verdict = verdict


class OriginalNotRunnableError(Exception):
    """The original cannot be run."""


def inject(path: Path, through: str, work: Path) -> Path:
    """Return the injected model's file.

    Raises:
        NotInjectedError: There is none.
    """
    if through == "command":
        return _inject_by_command(path, work)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes, such as a limit
            if through == "api":
                kvsurgeon.inject(path, work)
            else:
                kvsurgeon.KeyValueCacheInjector(path.parent).export(onnx.load(path, load_external_data=False), work)
    except ParityError as error:
        raise NotInjectedError(Verdict(verdict=CAUGHT, reason=str(error))) from error
    except KvsurgeonError as error:
        unexpected = isinstance(error, PassError) and not isinstance(error.__cause__, KvsurgeonError)
        reason = f"{error} [{getattr(error, 'code', '')}]"
        raise NotInjectedError(Verdict(verdict=CRASH if unexpected else REFUSED, reason=reason)) from error
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {_one_line(error)} at {Path(last.filename).name}:{last.lineno}"
        raise NotInjectedError(Verdict(verdict=CRASH, reason=reason)) from error
    return next(work.glob("*.onnx"))


def _inject_by_command(path: Path, work: Path) -> Path:
    command = [str(Path(sys.executable).with_name("kvsurgeon")), "inject", str(path), "-o", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if "Traceback" in done.stderr or done.returncode not in (0, 1, 3, 4):
        raise NotInjectedError(Verdict(verdict=CRASH, reason=f"exit {done.returncode}: {last}"))
    if done.returncode:
        raise NotInjectedError(Verdict(verdict=CAUGHT if done.returncode == 1 else REFUSED, reason=last))
    return next(work.glob("*.onnx"))


def _session(path: Path, *, arena: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = arena  # faster with one, but it keeps what it has
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def texts(batch: int, length: int, vocabulary: int) -> np.ndarray:
    """Return token ids [batch, length]: now and then one whose embedding is larger than all before."""
    random = np.random.default_rng(batch)
    if vocabulary != VOCABULARY:
        return random.integers(0, vocabulary, (batch, length))
    ids = random.integers(0, ORDINARY_TOKENS, (batch, length))
    for token, place in enumerate((16, 63, 128, 513, 1024, 2047, 3998)):
        if place < length:
            ids[-1, place] = ORDINARY_TOKENS + token
    return ids


class Reference:
    """The original: its outputs for the first tokens of a text."""

    def __init__(self, path: Path, *, arena: bool = True) -> None:
        try:
            self.session = _session(path, arena=arena)
        except Exception as error:
            raise OriginalNotRunnableError(_one_line(error)) from error
        self.names = [output.name for output in self.session.get_outputs()]
        self.vocabulary = _vocabulary(onnx.load(path, load_external_data=False), self.session)
        self.kept: dict[tuple[int, int], list[np.ndarray] | None] = {}

    def feeds(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        feeds = {}
        for given in self.session.get_inputs():
            if len(given.shape) != 2 or given.type not in NUMPY_TYPES:
                raise OriginalNotRunnableError(f"input {given.name} {given.shape} {given.type}")
            kind = NUMPY_TYPES[given.type]
            if "mask" in given.name:
                array = np.ones(ids.shape, kind)
            elif "position" in given.name:
                array = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).astype(kind)
            elif np.dtype(kind).kind == "i":
                array = ids.astype(kind)
            else:
                raise OriginalNotRunnableError(f"input {given.name} {given.shape} {given.type}")
            feeds[given.name] = np.ascontiguousarray(array)
        return feeds

    def __call__(self, ids: np.ndarray) -> list[np.ndarray] | None:
        """Return the outputs; None if it cannot be run at this length."""
        key = (len(ids), ids.shape[1])
        if key not in self.kept:
            try:
                self.kept[key] = self.session.run(self.names, self.feeds(ids))
            except OriginalNotRunnableError:
                raise
            except Exception:
                self.kept[key] = None
        return self.kept[key]


def _vocabulary(model: onnx.ModelProto, session: ort.InferenceSession) -> int:
    last = session.get_outputs()[0].shape[-1:]
    if last and isinstance(last[0], int) and last[0] > 8:
        return int(last[0])
    ids = {given.name for given in session.get_inputs()}
    tables = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[1] in ids and node.input[0] in tables:
            return int(tables[node.input[0]][0])
    return 60


@dataclass
class Candidate:
    """The injected model, called chunk by chunk."""

    path: Path
    original: onnx.ModelProto
    arena: bool = True
    cache: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.session = _session(self.path, arena=self.arena)
        self.contract = read_contract(self.session, self.original)
        self.names = [output.name for output in self.original.graph.output]

    def reset(self, batch: int) -> None:
        self.cache = {
            name: np.zeros(empty_sizes(name, dims, batch), kind) for name, (dims, kind) in self.contract.pasts.items()
        }

    def __call__(self, feeds: dict[str, np.ndarray], start: int, end: int) -> list[np.ndarray]:
        """Return the outputs of the original's names for tokens `start` to `end`."""
        given = {}
        for name, dims in self.contract.given.items():
            picks = [
                slice(start, end) if dim == NEW else slice(0, end) if dim in TOTALS else slice(None) for dim in dims
            ]
            if name not in feeds or any(isinstance(d, str) and d not in (BATCH, NEW, PAST, *TOTALS) for d in dims):
                raise ContractError(f"input `{name}` has dims {dims}")
            given[name] = np.ascontiguousarray(feeds[name][tuple(picks)])
        wanted = [*self.names, *(name for name in self.contract.presents if name not in self.names)]
        found = dict(zip(wanted, self.session.run(wanted, {**given, **self.cache}), strict=True))
        self.cache = {name: found[present] for name, present in zip(self.cache, self.contract.presents, strict=True)}
        return [found[name] for name in self.names]


def compare(reference: Reference, candidate: Candidate, plan: Sequence[Chunking]) -> Verdict:
    """Return whether the injected model gives what the original gives for the text so far."""
    limited: Verdict | None = None
    compared = 0
    error_allowed = bound_of(candidate.original).error
    try:
        for chunking in plan:
            verdict, count = _compare_chunking(reference, candidate, chunking, error_allowed)
            compared += count
            if verdict is not None and verdict.verdict != LIMITED:
                return verdict
            limited = limited or verdict
    except OriginalNotRunnableError as error:
        return Verdict(verdict=NOT_COMPARED, reason=str(error))
    changes = changes_with_later_tokens(reference, error_allowed)
    if not compared and limited is None:
        return Verdict(verdict=NOT_COMPARED, reason="the original cannot be run at any length")
    if limited:
        return Verdict(verdict=LIMITED, reason=limited.reason, at=limited.at, changes=changes)
    return Verdict(verdict=RIGHT, changes=changes)


def _compare_chunking(
    reference: Reference, candidate: Candidate, chunking: Chunking, allowed: float
) -> tuple[Verdict | None, int]:
    if not chunking.steps:
        return None, 0
    ids = texts(chunking.batch, chunking.steps[-1][0], reference.vocabulary)
    feeds = reference.feeds(ids)
    start = compared = 0
    try:
        candidate.reset(chunking.batch)
    except Exception as error:
        return Verdict(verdict=WRONG, reason=_one_line(error)), 0
    for end, is_compared in chunking.steps:
        expected = reference(ids[:, :end]) if is_compared else []
        if expected is None:
            return None, compared  # the original ends here too
        try:
            found = candidate(feeds, start, end)
        except Exception as error:
            if not expected and reference(ids[:, :end]) is None:
                return None, compared
            reason = f"{chunking.batch} x {start} + {end - start}: {_one_line(error)}"
            stops = compared > 0 or start == 0
            return Verdict(verdict=LIMITED if stops else WRONG, reason=reason, at=end), compared
        if is_compared:
            compared += 1
            for name, one, other in zip(candidate.names, found, expected, strict=True):
                if fault := difference(one, other, start, end, chunking.batch, allowed):
                    where = f"{chunking.batch} x {start} + {end - start}: `{name}` {fault}"
                    return Verdict(verdict=WRONG, reason=where, at=end), compared
        start = end
    return None, compared


def difference(found: np.ndarray, whole: np.ndarray, start: int, end: int, batch: int, allowed: float) -> str:
    """Return how an output of tokens `start` to `end` differs from that of the whole text; empty if it does not."""
    if found.ndim != whole.ndim:
        return f"has shape {found.shape}, expected part of {whole.shape}"
    expected = whole
    for axis, (size, full) in enumerate(zip(found.shape, whole.shape, strict=True)):
        if size == full:
            continue
        if full == end and size == end - start:
            expected = np.take(expected, range(start, end), axis=axis)
        elif full == batch * end and size == batch * (end - start) and axis == 0:
            split = expected.reshape(batch, end, *expected.shape[1:])[:, start:]
            expected = split.reshape(-1, *expected.shape[1:])
        else:
            return f"has shape {found.shape}, expected part of {whole.shape}"
    return _numeric(found, expected, allowed)


def _numeric(found: np.ndarray, expected: np.ndarray, allowed: float) -> str:
    if not found.size:
        return ""
    if expected.dtype.kind in "iub":
        if np.array_equal(found, expected):
            return ""
        place = tuple(int(one) for one in np.argwhere(found != expected)[0])
        return f"{found[place]} instead of {expected[place]} at {place}"
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(found)):
        return "is not finite in the same places"
    values = expected[finite]
    spread = float(np.ptp(values)) if values.size else 0.0
    scale = max(spread, 1e-6 * float(np.abs(values).max(initial=0)), 1e-9)
    if expected.ndim and expected.shape[-1] > 1 and finite.all():
        rows = np.maximum(np.ptp(expected, axis=-1, keepdims=True), 0.01 * scale)
    else:
        rows = np.full((1,) * expected.ndim, max(scale, float(np.abs(values).max(initial=0)) * 0.01))
    with np.errstate(invalid="ignore"):
        error = np.nan_to_num(np.abs(found - expected) / rows)
    worst = float(error.max())
    return f"differs by {worst:.2g} of its spread" if worst > allowed else ""


def changes_with_later_tokens(reference: Reference, allowed: float) -> bool:
    """Whether the first output of the original changes for tokens that both of two texts begin with."""
    kept = [(key, outputs) for key in sorted(reference.kept) if (outputs := reference.kept[key]) is not None]
    for ((batch, short), few), ((other, long), many) in itertools.pairwise(kept):
        if batch == other and short < long and _differs(few, many, short, long, batch, allowed):
            return True
    return False


def _differs(
    few: Sequence[np.ndarray], many: Sequence[np.ndarray], short: int, long: int, batch: int, allowed: float
) -> bool:
    for one, whole in zip(few, many, strict=True):
        if one.ndim != whole.ndim:
            return True
        expected = whole
        for axis, (size, full) in enumerate(zip(one.shape, whole.shape, strict=True)):
            if size == short and full == long and size != full:
                expected = np.take(expected, range(short), axis=axis)
        if one.shape != expected.shape or _numeric(one, expected, 2 * allowed):
            return True
    return False


def original_changes(path: Path, threshold: int | None, heads: int) -> bool | None:
    """Whether the original changes with later tokens, without any injection; None if it cannot be run."""
    longest = max(min(4000, int((SCORE_ELEMENTS / heads) ** 0.5)), (threshold or 0) + 45)
    reference = Reference(path)
    for chunking in chunkings(threshold, longest):
        ids = texts(chunking.batch, chunking.steps[-1][0], reference.vocabulary)
        for end, is_compared in chunking.steps:
            if is_compared and reference(ids[:, :end]) is not None and changes_with_later_tokens(reference, 1e-3):
                return True
    return False if any(outputs is not None for outputs in reference.kept.values()) else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
