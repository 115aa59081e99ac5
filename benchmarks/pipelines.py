"""Runs passes in rows drawn at random on models drawn at random: is each result the same, lossy on purpose, or refused?

    python benchmarks/pipelines.py FOLDER... [--rows N] [--seed S] [--only NUMBER] [--json OUT]
    python benchmarks/pipelines.py FOLDER... --smaller-caches [--sample N] [--seed S] [--only NUMBER] [--json OUT]

Everything is drawn from the seed: row NUMBER of a seed is the same one whatever else is run. With `--smaller-caches`
each pass that makes a cache smaller, or the input of it cheaper, runs on each model instead. Passes are calibrated on
random token IDs. Ends with 1 if a result differs, cannot be run, or a pass raised what it did not mean to.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from campaigns.results import collect
from campaigns.workers import DIED, HUNG, run_all
from coverage import quiet
from verification.corpus import Entry, find_entries, spread_sample

from kvsurgeon import Pipeline
from kvsurgeon.errors import InternalError, KvsurgeonError, ParityError, PassError, RunError, UnsupportedError
from kvsurgeon.parity.prediction import longest_text, open_decoder, vocabulary_size
from kvsurgeon.passes.contract import Unchanged
from kvsurgeon.workflow.run_and_save import run_and_save

BAD = frozenset({"different", "does not run", "traceback", HUNG, DIED})
CATEGORIES = ("same", "lossy", "unchanged", "refused", *sorted(BAD))
LONGEST = 3  # passes in a row
WITH_A_CACHE = 0.75  # of the rows
TEXT = 1024  # token IDs to calibrate passes on, and to measure their loss on
SECONDS_ALLOWED = 300

CACHE = (
    "",
    "{cache=static}",
    "{cache=static,past-length=mask}",
    "{cache=static,past-length=positions}",
    "{cache=static,max-length=96}",
    "{cache=new-tokens}",
    "{cache=new-tokens,past-length=input}",
    "{key-layout=batch,kv_heads,head_dim,sequence}",
    "{past=p_{kind}_{layer},present=n_{kind}_{layer}}",
)
PASSES: tuple[tuple[str, tuple[str, ...], int], ...] = (  # name, options, weight
    ("inject", CACHE, 1),
    ("retarget", CACHE, 4),
    ("remove-cache", ("",), 3),
    ("replicate-kv-heads", ("{repeat=2}", "{repeat=3}", "{repeat=4}"), 3),
    ("expand-gqa", ("",), 3),
    ("merge-kv-heads", ("{kv-heads=1}", "{kv-heads=1,method=mean}", "{kv-heads=2,method=first}"), 2),
    ("share-kv-layers", ("{kv-layers=1}", "{kv-layers=1,method=mean}"), 2),
    ("low-rank-values", ("{rank=6}",), 1),
    ("swiftkv", ("{after=0}",), 1),
    ("window-cache", ("", "{window=6,sinks=2}"), 2),
    ("latent-cache", ("",), 1),
    ("quantize-cache", ("", "{bits=4}", "{bits=4,hadamard=true}"), 2),
    ("add-position-ids", ("",), 2),
    ("raise-opset", ("{opset=21}", "{opset=23}", "{opset=24}"), 2),
    ("fix-shapes", ("{tokens=4,max-length=96}", "{tokens=1,max-length=96}"), 1),
    ("last-logits", ("",), 1),
    ("add-query-lengths", ("",), 1),
    ("add-batch-index", ("",), 1),
    ("num-logits-to-keep", ("",), 1),
    ("float16-mask-range", ("",), 1),
    ("int32-inputs", ("",), 1),
    ("remove-nan-guards", ("",), 1),
    ("past-length-from-positions", ("",), 1),
    ("remove-mask", ("",), 1),
    ("host-inputs", ("{max-length=96}",), 1),
    ("fuse-attention", ("", "{layers=supported}", "{operator=attention,layers=supported}"), 3),
    ("fuse-rotary", ("",), 1),
    ("reciprocal-to-div", ("",), 1),
    ("fuse-skip-norms", ("",), 1),
    ("fuse-causal-convs", ("",), 1),
    ("fuse-linear-attention", ("",), 1),
    ("pack-projections", ("",), 1),
    ("store-transposed-weights", ("",), 1),
    ("optimize", ("", "{layers=all}"), 1),
    ("gather-nd-to-gather", ("",), 1),
    ("lower-opset", ("{opset=17}", "{opset=13}"), 1),
    ("rename-dims", ("{dims=batch_size=1}", "{dims=batch_size=texts}"), 1),
    ("chunk-length", ("{tokens=2}",), 1),
    ("einsum-to-matmul", ("",), 1),
    ("name-states", ("", "{after-attention=true}"), 1),
    ("rename-io", ("{names=logits=scores}",), 1),
)
SMALLER_CACHES = (
    "inject,window-cache",
    "inject,window-cache{window=6,sinks=2}",
    "latent-cache,inject",
    "inject,quantize-cache",
    "inject,quantize-cache{bits=4}",
    "inject,quantize-cache{bits=4,hadamard=true}",
    "inject,fuse-attention{layers=supported},quantize-cache{scales=per-channel}",
    "inject,merge-kv-heads{kv-heads=1}",
    "inject,share-kv-layers{kv-layers=1}",
    "low-rank-values{rank=6},inject",
    "inject,swiftkv{after=0},separate-prefill",
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A pipeline, and the model that it runs on."""

    number: int
    entry: Entry
    row: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one pipeline."""

    number: int
    model: str
    row: str
    category: str
    said: str = ""
    reason: str = ""  # of a refusal, without names
    seconds: float = 0.0


def drawn(entries: Sequence[Entry], seed: int, number: int) -> Task:
    """Return the model and the passes of one number."""
    random = Random(f"{seed}/{number}")
    entry = random.choice(entries)
    chosen = random.choices(PASSES, [weight for *_, weight in PASSES], k=random.randint(1, LONGEST))
    if random.random() < WITH_A_CACHE:
        chosen.insert(random.randrange(len(chosen)), PASSES[0])
    return Task(
        number=number, entry=entry, row=",".join(f"{name}{random.choice(options)}" for name, options, _ in chosen)
    )


def each_smaller_cache(entries: Sequence[Entry]) -> list[Task]:
    """Return each pipeline of `SMALLER_CACHES` for each model."""
    rows = [(entry, row) for entry in entries for row in SMALLER_CACHES]
    return [Task(number=number, entry=entry, row=row) for number, (entry, row) in enumerate(rows)]


def examine(task: Task) -> Outcome:
    """Run the passes on the model, and verify the result."""
    quiet()
    start = time.perf_counter()
    blank = Outcome(number=task.number, model=task.entry.label, row=task.row, category="")
    outcome = _tried(blank, task)
    return replace(outcome, seconds=time.perf_counter() - start)


def _tried(blank: Outcome, task: Task) -> Outcome:
    passes = Pipeline.parse(task.row)
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = run_and_save(task.entry.path, passes, text=_text(task, Path(folder)))
    except ParityError as error:
        return replace(blank, category="different", said=str(error))
    except KvsurgeonError as error:
        reason = getattr(error, "reason", type(error).__name__)
        return replace(blank, category=_category(error), said=str(error), reason=f"{error.code}: {reason}"[:200])
    except Exception as error:
        return replace(blank, category="traceback", said=f"{type(error).__name__}: {error}")
    if all(isinstance(step.outcome, Unchanged) for step in done.steps):
        return replace(blank, category="unchanged")
    return replace(blank, category="lossy" if done.verification is None else "same")


def _category(error: KvsurgeonError) -> str:
    if isinstance(error, PassError | InternalError):
        return "refused" if isinstance(error.__cause__, KvsurgeonError) else "traceback"
    if isinstance(error, RunError):
        return "does not run" if error.exit_code != UnsupportedError.exit_code else "refused"
    return "refused"


def _text(task: Task, folder: Path) -> Path | None:
    """Write random token IDs that the model takes; None if it takes no token IDs."""
    try:
        decoder = open_decoder(task.entry.path, task.entry.label, (), None, None)
        size = vocabulary_size(decoder, decoder.length or longest_text(decoder, TEXT))
    except (KvsurgeonError, IndexError, KeyError):
        return None
    text = folder / "text.txt"
    text.write_text(",".join(map(str, np.random.default_rng(task.number).integers(0, size, TEXT))), "utf-8")
    return text


def report(outcomes: Sequence[Outcome], names: Sequence[str]) -> None:
    """Print what was bad, each with how to see it again, counts by pass or pipeline, and the reasons of refusals."""
    for one in outcomes:
        if one.category in BAD:
            print(f"\n{one.category}: row {one.number} on {one.model}: {one.row}\n    {one.said[:400]}")
    width = max(map(len, names))
    print(f"\n{'':{width}}", *(f"{category:>13}" for category in CATEGORIES))
    for name in [*names, "all"]:
        counts = Counter(one.category for one in outcomes if name in _names(one.row))
        print(f"{name:{width}}", *(f"{counts[category] or '.':>13}" for category in CATEGORIES))
    for (row, reason), count in sorted(Counter((_refused(one, names), one.reason) for one in outcomes).items()):
        if reason:
            print(f"{row:{width}} {count:5} {reason}")


def _names(row: str) -> set[str]:
    """Return a pipeline, the names of its passes, and "all"."""
    return {row, *re.split(r"[,{}]", row), "all"}


def _refused(outcome: Outcome, names: Sequence[str]) -> str:
    return outcome.row if outcome.row in names else "all"


def main() -> int:
    """Run all rows, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--smaller-caches", action="store_true", help="run SMALLER_CACHES on each model instead")
    parser.add_argument("--sample", type=int, help="of so many models, evenly spaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, action="append", help="only the row of this number; repeatable")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    found = find_entries(options.folders, groups=[], names=[])
    entries = [one for one in found if one.expected == "inject" and not one.damaged]
    names: Sequence[str] = [name for name, *_ in PASSES]
    if options.smaller_caches:
        names, tasks = SMALLER_CACHES, each_smaller_cache(spread_sample(entries, options.sample))
    else:
        tasks = [drawn(entries, options.seed, number) for number in options.only or range(options.rows)]
    tasks = [task for task in tasks if not options.only or task.number in options.only]
    outcomes = collect(_outcomes(tasks), partial(_save, options.json) if options.json else None)
    report(outcomes, names)
    return 1 if any(one.category in BAD for one in outcomes) else 0


def _outcomes(tasks: Sequence[Task]) -> Iterator[Outcome]:
    for task, found in run_all(examine, tasks, jobs=1, seconds=SECONDS_ALLOWED):
        blank = Outcome(number=task.number, model=task.entry.label, row=task.row, category=str(found))
        yield blank if found in (HUNG, DIED) else found


def _save(path: Path, outcomes: Sequence[Outcome]) -> None:
    path.write_text(json.dumps([asdict(one) for one in outcomes], indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
