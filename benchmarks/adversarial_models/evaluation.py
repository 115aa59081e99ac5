"""Inject a decoder, and compare the result with the original at many lengths."""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from verification.chunked_comparison import (
    LIMITED,
    NOT_COMPARED,
    RIGHT,
    WRONG,
    Candidate,
    Chunking,
    OriginalNotRunnableError,
    Reference,
    Verdict,
    changes_with_later_tokens,
    compare,
    one_line,
)
from verification.drawn_inputs import random_ids

import kvsurgeon
from adversarial_models.decoder import ORDINARY_TOKENS, VOCABULARY
from kvsurgeon.errors import InternalError, KvsurgeonError, ParityError, PassError

REFUSED, CAUGHT, CRASH, HANG = "refused", "caught", "crash", "hang"
VERDICTS = (RIGHT, LIMITED, REFUSED, CAUGHT, WRONG, CRASH, HANG, NOT_COMPARED)
BAD = frozenset({WRONG, CRASH, HANG})

SECONDS_TO_INJECT = 60
SWEEP_LENGTHS = (65, 130, 514, 1026, 2049, 4000)  # tokens
SCORE_ELEMENTS = 64e6  # heads * length ** 2 of one tensor of scores


def chunkings(threshold: int | None, longest: int, *, padded: bool = False) -> list[Chunking]:
    """Return the calls for a model that may change at a threshold, those with padding if it is padded."""
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
    late = [one for one in near if 18 < one < 1100]
    result.append(Chunking(batch=3, steps=tuple((one, True) for one in (3, 4, 17, 18, *late))))
    result.append(Chunking(batch=7, steps=tuple((one, True) for one in (3, 4, 17, *late[-2:]))))
    if padded:
        around = ((1, False), (9, False), (10, True), (12, True), *((one, True) for one in late))
        result.append(Chunking(batch=2, padding=5, steps=around))
        many = max(late, default=20) + 3  # the first call has padding alone
        result.append(Chunking(batch=2, padding=many, steps=((many // 2, False), (many + 2, False), (many + 6, True))))
    if at_once and start > 45:
        result.append(Chunking(batch=1, steps=tuple(at_once)))
    return result


def chunkings_around(lengths: Sequence[int], longest: int) -> Iterator[Chunking]:
    """Yield calls on both sides of each length."""
    near = sorted({one + more for one in lengths for more in (-1, 0, 1, 2) if 6 < one + more <= longest})
    if near:
        yield Chunking(batch=1, steps=tuple((one, True) for one in near))


def longest_text(threshold: int | None, heads: int) -> int:
    """Return the number of tokens that fits in memory, but at least some beyond a threshold."""
    return max(min(4000, int((SCORE_ELEMENTS / heads) ** 0.5)), (threshold or 0) + 45)


def text_with_large_embeddings(batch: int, length: int, vocabulary: int) -> np.ndarray:
    """Return token ids [batch, length]: for a drawn decoder, some have a larger embedding than all before."""
    if vocabulary != VOCABULARY:
        return random_ids(batch, length, vocabulary)
    ids = random_ids(batch, length, ORDINARY_TOKENS)
    for token, place in enumerate((16, 63, 128, 513, 1024, 2047, 3998)):
        if place < length:
            ids[-1, place] = ORDINARY_TOKENS + token
    return ids


def evaluate(
    path: Path, *, threshold: int | None, heads: int, through: str, work: Path, lengths: Sequence[int] = (),
    padded: bool = False,
) -> Verdict:  # fmt: skip
    """Return what `inject` makes of a model, whose mask input is for padding if it is padded."""
    start = time.perf_counter()
    try:
        injected = inject(path, through, work)
    except NotInjectedError as error:
        return error.verdict
    if time.perf_counter() - start > SECONDS_TO_INJECT:
        return Verdict(verdict=HANG, reason=f"injected in {time.perf_counter() - start:.0f} s")
    original = onnx.load(path, load_external_data=False)
    longest = longest_text(threshold, heads)
    try:
        reference = Reference(path, draw_text=text_with_large_embeddings)
    except OriginalNotRunnableError as error:
        return Verdict(verdict=NOT_COMPARED, reason=str(error))
    try:
        candidate = Candidate(injected, original)
    except Exception as error:
        return Verdict(verdict=WRONG, reason=f"cannot be run: {one_line(error)}")
    plan = [*chunkings(threshold, longest, padded=padded), *chunkings_around(lengths, longest)]
    return compare(reference, candidate, plan)


def original_changes(path: Path, threshold: int | None, heads: int, *, padded: bool = False) -> bool | None:
    """Whether the original changes with later tokens, without any injection; None if it cannot be run."""
    reference = Reference(path, draw_text=text_with_large_embeddings)
    for chunking in chunkings(threshold, longest_text(threshold, heads), padded=padded):
        ids = reference.text(chunking.batch, chunking.steps[-1][0])
        for end, is_compared in chunking.steps:
            if (
                is_compared
                and reference(ids[:, :end], chunking.padding) is not None
                and changes_with_later_tokens(reference, 1e-3)
            ):
                return True
    return False if any(outputs is not None for outputs in reference.kept.values()) else None


class NotInjectedError(Exception):
    """No model was written: the verdict is given before anything is compared."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.reason)
        self.verdict = verdict


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
        unexpected = isinstance(error, PassError | InternalError) and not isinstance(error.__cause__, KvsurgeonError)
        reason = f"{error} [{getattr(error, 'code', '')}]"
        raise NotInjectedError(Verdict(verdict=CRASH if unexpected else REFUSED, reason=reason)) from error
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {one_line(error)} at {Path(last.filename).name}:{last.lineno}"
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
