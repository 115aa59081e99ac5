"""Inject and verify every model of a corpus: which are right, wrong, refused, crashed?

    python benchmarks/coverage.py FOLDER... [--group G] [--only NAME] [--expected E] [--sample N]
                                            [--through command] [--json OUT] [--markdown OUT]

Each model is injected through the Python API in this process, then run in onnxruntime and compared with stored logits:
in one call, token by token, and in uneven chunks, left-padded batches included.
Ends with 1 if anything is wrong, crashed or hung, or refused with an exit code other than 3 and 4.
With `--through command` the command `kvsurgeon inject` is run instead, and its exit code and output are checked.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import onnx
import onnxruntime as ort
from verification.by_command import inject_by_command
from verification.corpus import Entry, corpus_parser, find_entries, spread_sample
from verification.coverage_page import as_markdown
from verification.independent_verifier import (
    BRAIN,
    ContractError,
    bound_of,
    failures,
    is_rounded,
    open_session,
    read_contract,
    score_case,
)
from verification.uncached import highest_level, steady
from verification.verdicts import Result, as_json, is_bad, print_groups, print_reasons, print_totals
from verification.widening import widened

import kvsurgeon
import kvsurgeon.io
from kvsurgeon.errors import InternalError, KvsurgeonError, PassError

SECONDS_ALLOWED = 60
Inject = Callable[[Entry], tuple[onnx.ModelProto, onnx.ModelProto]]  # the original and the injected


class TookTooLong(BaseException):
    """Raised by the alarm; no `except Exception` of the code under test can swallow it."""


def examine(entry: Entry, inject: Inject) -> Result:
    """Inject and verify one model; every outcome becomes a verdict."""
    blank = Result(
        group=entry.group, name=entry.name, family=entry.family, exporter=entry.exporter, expected=entry.expected
    )
    start = time.perf_counter()
    try:
        with _alarm(SECONDS_ALLOWED):
            original, injected = inject(entry)
            seconds = time.perf_counter() - start
            return _verified(replace(blank, apply_seconds=seconds), entry, original, injected)
    except TookTooLong as late:
        verdict, reason, exit_code = "hung", f"not done after {SECONDS_ALLOWED} s, {_where(late)}", -1
    except Exception as error:
        exit_code = _exit_code(error)
        verdict = "crashed" if exit_code < 0 else "refused"
        reason = f"{type(error).__name__}: {_one_line(error)}" + (f", {_where(error)}" if exit_code < 0 else "")
        gist = _gist(str(getattr(error, "reason", "") or reason))
        blank = replace(blank, gist=gist, code=str(getattr(error, "code", "")))
    seconds = time.perf_counter() - start
    return replace(
        blank,
        verdict=verdict,
        reason=reason,
        exit_code=exit_code,
        apply_seconds=seconds,
    )


def inject_with_kvsurgeon(entry: Entry) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return a model and its injected twin, made as SparseML's users do."""
    if entry.damaged:
        kvsurgeon.io.load(entry.path)
    original = onnx.load(entry.path, load_external_data=False)
    kept = onnx.ModelProto.FromString(original.SerializeToString())
    return kept, kvsurgeon.KeyValueCacheInjector(entry.folder).apply(original)


def take_instead(entry: Entry, *, file: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return a model and another file of its folder, to test the verifier."""
    original = onnx.load(entry.path, load_external_data=False)
    return original, onnx.load(entry.folder / file, load_external_data=False)


def _verified(result: Result, entry: Entry, original: onnx.ModelProto, injected: onnx.ModelProto) -> Result:
    bound = bound_of(original)
    try:
        cases, level = entry.cases(original), highest_level(original, entry.folder)
        if is_rounded(original):
            level, cases = steady(original, entry.folder, cases, bound)
        session = open_session(widened(injected, entry.folder) if bound is BRAIN else injected, entry.folder, level)
        contract = read_contract(session, original)
        if not cases:
            verdict = "wrong" if entry.expected == "refuse" else "not verified"
            return replace(result, verdict=verdict, reason="injected, and no logits are stored to compare with")
        scores = [score for case in cases for score in score_case(session, contract, case)]
    except ContractError as error:
        return replace(result, verdict="wrong", reason=str(error), gist=_gist(str(error)), bound=bound.name)
    except Exception as error:  # onnxruntime's own, and numpy's for what it was fed
        excused = entry.expected != "refuse" and not _runs(original, entry)
        verdict = "not runnable" if excused else "wrong"
        reason = f"onnxruntime: {_one_line(error)}"
        return replace(result, verdict=verdict, reason=reason, gist=_gist(reason), bound=bound.name)
    result = replace(result, bound=bound.name, scores=scores)
    failed = failures(scores, bound)
    if not failed:
        return result
    worst = max(failed, key=lambda score: score.error)
    reason = (
        f"{worst.chunking}, case {worst.case}: error {worst.error:.2g} (bound {bound.error:g}), argmax agreement "
        f"{worst.agreement:.2f}, worst at position {worst.position}"
    )
    gist = "logits differ in " + ", ".join(sorted({f"{score.chunking} (case {score.case})" for score in failed}))
    return replace(result, verdict="wrong", reason=reason, gist=gist)


def _runs(original: onnx.ModelProto, entry: Entry) -> bool:
    try:
        open_session(original, entry.folder)
    except Exception:
        return False
    return True


def _exit_code(error: Exception) -> int:
    """Return the exit code of a deliberate error; -1 for any other."""
    if isinstance(error, InternalError) or not isinstance(error, KvsurgeonError):
        return -1
    if isinstance(error, PassError) and not isinstance(error.__cause__, KvsurgeonError):
        return -1  # a pass of kvsurgeon's own stumbled, or left a graph that is not valid
    return error.exit_code


def _where(error: BaseException) -> str:
    """Return where an exception came from: the last frame, and the last one of kvsurgeon."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name != "ring"]
    own = [frame for frame in frames if "kvsurgeon" in Path(frame.filename).parts]
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in [*own[-1:], *frames[-1:]]]
    return "in " + " > ".join(dict.fromkeys(places))


def _one_line(error: BaseException) -> str:
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/\S+ ", "", str(error))
    return " ".join(text.split())[:400]


def _gist(message: str) -> str:
    """Return a message without the names and numbers that differ from model to model."""
    message = re.sub(r"`[^`]*`|'[^']*'|\"[^\"]*\"", "`.`", message)
    return re.sub(r"\d+", "#", message)[:200]


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def sweep(entries: Sequence[Entry], inject: Inject, *, jobs: int) -> list[Result]:
    """Return a result for each entry, in their order; a count goes to the terminal on the way."""
    one = partial(examine, inject=inject)
    if jobs == 1:
        return list(_counted(map(one, entries), len(entries)))
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=quiet) as pool:
        return list(_counted(pool.imap(one, entries), len(entries)))


def _counted(results: Iterator[Result], total: int) -> Iterator[Result]:
    for count, result in enumerate(results, start=1):
        if sys.stderr.isatty():
            print(f"\r{count}/{total} {result.group}/{result.name:40.40}", end="", file=sys.stderr)
        yield result
    if sys.stderr.isatty():
        print("\r" + " " * 79 + "\r", end="", file=sys.stderr)


def quiet() -> None:
    """Silence the logs of libraries."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    ort.set_default_logger_severity(4)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = corpus_parser(__doc__)
    parser.add_argument("--expected", action="append", default=[], choices=["inject", "either", "refuse"])
    parser.add_argument("--through", default="python", choices=["python", "command"])
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--instead", metavar="FILE", help="verify this file of each folder and inject nothing")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="table by family and exporter")
    return parser.parse_args(arguments)


def main() -> int:
    """Sweep, print, and return the exit code."""
    options = parse()
    quiet()
    entries = find_entries(options.folders, groups=options.group, names=options.only)
    if options.instead:
        entries = [entry for entry in entries if (entry.folder / options.instead).exists()]
    entries = [entry for entry in entries if not options.expected or entry.expected in options.expected]
    entries = spread_sample(entries, options.sample)
    if not entries:
        print("no model found: expected FOLDER/<group>/<name>/meta.json", file=sys.stderr)
        return 2
    inject: Inject = inject_by_command if options.through == "command" else inject_with_kvsurgeon
    inject = partial(take_instead, file=options.instead) if options.instead else inject
    start = time.perf_counter()
    results = sweep(entries, inject, jobs=options.jobs)
    seconds = time.perf_counter() - start
    print_groups(results)
    print_reasons(results)
    print_totals(results, seconds)
    if options.json:
        options.json.write_text(as_json(results, seconds), encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(as_markdown(results), encoding="utf-8")
    return 1 if any(is_bad(result) for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
