"""Write decoders whose outputs a KV cache would change, and check what `inject` does with each.

    python benchmarks/adversarial.py [--models N] [--seed S] [--sample N] [--only NUMBER] [--kinds GLOB] [--jobs N]
                                     [--benign yes|no|only] [--through api|injector|command] [--keep FOLDER]
                                     [--json OUT] [--check]
    python benchmarks/adversarial.py --cases FOLDER... [--kinds GLOB] [--through ...] [--jobs N] [--json OUT]

The outputs of an adversarial decoder for earlier tokens change with the total length or with later tokens. It must be
refused, limited, or give the outputs of the original for the text so far, at every length up to 4,000. Its benign
counterpart has the same operators and is causal: it must be injected. Ends with 1 if a model was injected wrongly,
ended in a traceback or hung.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime as ort
from adversarial_models.catalogue import KINDS, kind_of, write_sample
from adversarial_models.evaluation import (
    BAD,
    CRASH,
    HANG,
    LIMITED,
    NOT_COMPARED,
    RIGHT,
    VERDICTS,
    Verdict,
    evaluate,
    original_changes,
)
from campaigns.results import collect, print_counts
from campaigns.workers import HUNG, run_all
from onnx import numpy_helper
from verification.corpus import find_entries

SUSPICIOUS = "suspicious"
SECONDS_ALLOWED = 240  # an injection takes 60 at most; comparisons at 4,000 tokens take longer on a busy machine


@dataclass(frozen=True, kw_only=True)
class Task:
    """One model to evaluate: a number of a seed, or a folder."""

    name: str
    kind: str
    seed: int = 0
    number: int = 0
    benign: bool = False
    folder: str = ""
    expected: str = ""
    through: str = "api"
    keep: str = ""
    check: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a task."""

    name: str
    kind: str
    benign: bool
    verdict: str
    expected: str = ""
    reason: str = ""
    at: int | None = None
    changes: bool | None = None
    place: str = ""
    threshold: int | None = None
    heads: int = 0
    variant: str = ""
    base: str = ""
    seconds: float = 0.0

    @property
    def label(self) -> str:
        """The verdict, marked for a benign decoder: a refusal of one is no fault, but counted."""
        return f"{self.verdict}-benign" if self.benign and self.verdict not in BAD else self.verdict

    @property
    def suspicious(self) -> bool:
        """Whether no output differs, although the original changes with later tokens: the calls may not show it."""
        return self.verdict == RIGHT and bool(self.changes) and not self.adds_output

    @property
    def adds_output(self) -> bool:
        """Whether the decoder has an output that may describe the whole text, as its length does."""
        return self.kind.startswith("output/")

    @property
    def bad(self) -> bool:
        return self.verdict in BAD or (self.expected == "inject" and self.verdict not in (RIGHT, LIMITED))


def run(task: Task) -> Outcome:
    """Write, inject and compare one model."""
    start = time.perf_counter()
    outcome = Outcome(name=task.name, kind=task.kind, benign=task.benign, verdict=NOT_COMPARED, expected=task.expected)
    with TemporaryDirectory() as scratch:
        work = Path(scratch) / "injected"
        if task.folder:
            path = Path(task.folder) / "model.onnx"
            verdict = evaluate(path, threshold=None, heads=4, through=task.through, work=work, lengths=literals(path))
        else:
            folder = Path(task.keep) / task.name if task.keep else Path(scratch) / "original"
            sample = write_sample(task.seed, task.number, folder, benign=task.benign, kind=task.kind)
            assert sample is not None
            outcome = replace(
                outcome,
                place=sample.place,
                threshold=sample.threshold,
                heads=sample.heads,
                variant=sample.variant,
                base=sample.base,
            )
            if task.check:
                verdict = Verdict(
                    verdict=NOT_COMPARED,
                    changes=original_changes(sample.path, sample.threshold, sample.heads, padded=sample.padded),
                )
            else:
                verdict = evaluate(
                    sample.path,
                    threshold=sample.threshold,
                    heads=sample.heads,
                    through=task.through,
                    work=work,
                    padded=sample.padded,
                )
            if task.keep and work.exists():
                shutil.copytree(work, folder / "injected", dirs_exist_ok=True)
    return replace(
        outcome,
        verdict=verdict.verdict,
        reason=verdict.reason,
        at=verdict.at,
        changes=verdict.changes,
        seconds=round(time.perf_counter() - start, 2),
    )


def literals(path: Path) -> list[int]:
    """Return the numbers in a graph that may be thresholds of a length."""
    graph = onnx.load(path, load_external_data=False).graph
    tensors = [tensor for tensor in graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    tensors += [a.t for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]
    found: set[int] = set()
    for tensor in tensors:
        if int(np.prod(tensor.dims)) <= 8 and tensor.data_type in (1, 6, 7, 11):
            found |= {round(float(one)) for one in numpy_helper.to_array(tensor).ravel() if 30 < one < 4000}
    return sorted(found)[:8]


def run_quietly(task: Task) -> Outcome:
    """Run a task; a fault of the benchmark itself is its outcome."""
    warnings.simplefilter("ignore")
    ort.set_default_logger_severity(4)
    try:
        with redirect_stdout(StringIO()):
            return run(task)
    except Exception as error:
        reason = f"the benchmark itself failed: {type(error).__name__}: {error}"
        return Outcome(name=task.name, kind=task.kind, benign=task.benign, verdict=NOT_COMPARED, reason=reason)


def campaign(tasks: Sequence[Task], jobs: int) -> Iterator[Outcome]:
    """Yield the outcome of each task."""
    for task, result in run_all(run_quietly, tasks, jobs=jobs, seconds=SECONDS_ALLOWED):
        if isinstance(result, Outcome):
            yield result
        else:
            verdict = HANG if result == HUNG else CRASH
            reason = f"its process {result}"
            yield Outcome(name=task.name, kind=task.kind, benign=task.benign, verdict=verdict, reason=reason)


def tasks_of(options: argparse.Namespace) -> list[Task]:
    """Return the models to evaluate."""
    if options.cases:
        found = find_entries(options.cases, groups=[], names=options.kinds)
        tasks = [
            Task(name=one.label, kind=one.group, folder=str(one.folder), expected=one.expected, through=options.through)
            for one in found
            if one.path.exists()
        ]
        return tasks[:: max(1, len(tasks) // options.sample)] if options.sample else tasks
    numbers = options.only or range(options.first, options.first + options.models)
    if options.sample and not options.only:
        numbers = list(numbers)[:: max(1, options.models // options.sample)]
    tasks = []
    for number in numbers:
        kind = kind_of(options.seed, number)
        if options.kinds and not any(fnmatch.fnmatch(kind, glob) for glob in options.kinds):
            continue
        for benign in {"yes": (False, True), "no": (False,), "only": (True,)}[options.benign]:
            if benign and not KINDS[kind][1]:
                continue
            tasks.append(
                Task(
                    name=f"{number}-benign" if benign else str(number),
                    kind=kind,
                    seed=options.seed,
                    number=number,
                    benign=benign,
                    through=options.through,
                    keep=str(options.keep or ""),
                    check=options.check,
                )
            )
    return tasks


def report(outcomes: Sequence[Outcome], seconds: float) -> None:
    """Print what was bad, each with how to see it again, and counts by kind."""
    for outcome in outcomes:
        if outcome.bad:
            at = f" at {outcome.at} tokens" if outcome.at else ""
            print(
                f"{outcome.verdict}{at}: {outcome.name} {outcome.kind}, {outcome.variant} in {outcome.place}, ", end=""
            )
            print(f"threshold {outcome.threshold}, {outcome.heads} heads, {outcome.base}\n    {outcome.reason}")
    for benign in sorted({outcome.benign for outcome in outcomes}):
        some = [outcome for outcome in outcomes if outcome.benign == benign]
        used = [verdict for verdict in VERDICTS if any(one.verdict == verdict for one in some)]
        found = [(one.kind, one.verdict) for one in some]
        found += [(one.kind, SUSPICIOUS) for one in some if one.suspicious]
        print_counts("benign" if benign else "models", found, [*used, SUSPICIOUS])
    adversarial = [one for one in outcomes if not one.benign and not one.adds_output]
    without_effect = [one.name for one in adversarial if one.verdict == RIGHT and one.changes is False]
    suspicious = [one.name for one in outcomes if one.suspicious]
    with_effect = [one.name for one in outcomes if one.benign and one.changes]
    print(
        f"\n{len(outcomes)} models in {seconds:.0f} s; adversarial without effect: {without_effect}; "
        f"benign with one: {with_effect}; right, although the original changes with later tokens: {suspicious}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        type=int,
        default=300,
        help="number of adversarial models, each with its benign counterpart if it has one",
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, help="evaluate this many of them, evenly spaced")
    parser.add_argument("--only", type=int, action="append", help="only the model of this number; repeatable")
    parser.add_argument("--kinds", action="append", default=[], metavar="GLOB", help="only kinds, or cases, like this")
    parser.add_argument("--benign", choices=["yes", "no", "only"], default="yes")
    parser.add_argument("--through", choices=["api", "injector", "command"], default="api")
    parser.add_argument(
        "--cases", nargs="+", type=Path, metavar="FOLDER", help="evaluate models on disk by their meta.json"
    )
    parser.add_argument(
        "--check", action="store_true", help="inject nothing: check that originals are as they are called"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the models there, and what is injected")
    parser.add_argument("--json", type=Path, metavar="OUT")
    return parser.parse_args()


def main() -> int:
    """Run the campaign, print, and return the exit code."""
    options = parse()
    start = time.perf_counter()
    save = partial(_save, options) if options.json else None
    outcomes = collect(campaign(tasks_of(options), options.jobs), save)
    report(outcomes, time.perf_counter() - start)
    return 1 if any(outcome.bad for outcome in outcomes) else 0


def _save(options: argparse.Namespace, outcomes: Sequence[Outcome]) -> None:
    counts = Counter(outcome.label for outcome in outcomes)
    listed = [{**asdict(one), "label": one.label, "suspicious": one.suspicious} for one in outcomes]
    text = json.dumps(
        {"seed": options.seed, "through": options.through, "counts": counts, "outcomes": listed}, indent=1
    )
    options.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
