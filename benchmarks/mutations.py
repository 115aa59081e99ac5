"""Mutates decoders, and asks of each mutant: is it refused, or injected and the same with a cache as without?

    python benchmarks/mutations.py FOLDER... [--mutants N] [--seed S] [--models GLOB] [--only NUMBER]
                                             [--expected inject|either|refuse] [--json OUT] [--resume]

Everything is drawn from the seed: mutant NUMBER of a seed is the same one whatever else is made. Mutants are made and
run in separate processes, so that one which hangs or dies is counted. Ends with 1 if a mutant was injected
wrongly, ended in a traceback, hung or died.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path

import onnx
import onnxruntime as ort
from campaigns.results import collect, print_counts
from mutating import attention_insertions, insertions, mutants
from mutating.mutable_graph import Graph
from mutating.mutant_run import BAD, CATEGORIES, Notify, Outcome, ignore, seeded, try_file, try_mutant
from verification.corpus import Entry, find_entries

SECONDS_ALLOWED = 60
TRIES = 20  # mutations drawn until one finds a place

MUTATIONS = [*mutants.every(), *insertions.every(), *attention_insertions.every()]


Mutant = onnx.ModelProto | bytes  # a model, or a file that may not be one


def make(entries: Sequence[Entry], seed: int, number: int) -> tuple[Entry, Outcome, Mutant | None]:
    """Return one mutant, its model and what was done to it."""
    random = seeded(seed, number)
    entry = random.choice(entries)
    original = onnx.load(entry.path, load_external_data=False)
    outcome = Outcome(number=number, model=entry.label, mutation="none", reason="no mutation has a place in it")
    for _ in range(TRIES):
        name, mutation, _ = random.choices(MUTATIONS, [weight for *_, weight in MUTATIONS])[0]
        graph = Graph(model=onnx.ModelProto.FromString(original.SerializeToString()), random=random)
        recipe = mutation(graph)
        if recipe is not None and (graph.damaged is not None or graph.model != original):
            return entry, replace(outcome, mutation=name, recipe=recipe, reason=""), graph.damaged or graph.model
    return entry, outcome, None


def examine(entries: Sequence[Entry], seed: int, number: int, connection: Connection) -> Outcome:
    """Make and run one mutant; first send which one it is and the outcome that applies if the process dies."""
    entry, outcome, mutant = make(entries, seed, number)

    def promise(unheard: Outcome) -> None:
        connection.send((False, unheard))

    promise(replace(outcome, category="hang"))
    if mutant is None:
        return outcome
    return run_mutant(outcome, entry, mutant, promise)


def run_mutant(outcome: Outcome, entry: Entry, mutant: Mutant, notify: Notify = ignore) -> Outcome:
    """Return what became of a mutant; see `try_mutant` for `notify`."""
    return (try_file if isinstance(mutant, bytes) else try_mutant)(outcome, entry, mutant, notify)  # type: ignore[arg-type]


def work(entries: Sequence[Entry], seed: int, numbers: Sequence[int], connection: Connection) -> None:
    """Run mutants and send the outcome of each: first a provisional one, then the final one."""
    warnings.simplefilter("ignore")
    ort.set_default_logger_severity(4)
    for number in numbers:
        with redirect_stdout(StringIO()):  # onnxruntime's Python prints where a session cannot be made
            outcome = examine(entries, seed, number, connection)
        connection.send((True, outcome))
    connection.send(None)


def campaign(entries: Sequence[Entry], seed: int, numbers: Sequence[int]) -> Iterator[Outcome]:
    """Yield what became of each mutant; a worker that hangs or dies is ended and replaced."""
    context = multiprocessing.get_context("spawn")
    left = list(numbers)
    while left:
        mine, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(entries, seed, left, theirs), daemon=True)
        worker.start()
        theirs.close()
        for outcome in _until_stuck(mine):
            left.remove(outcome.number)
            yield outcome
        worker.kill()
        worker.join()


def _until_stuck(connection: Connection) -> Iterator[Outcome]:
    promised: Outcome | None = None
    while True:
        try:
            if not connection.poll(SECONDS_ALLOWED):
                break
            message: tuple[bool, Outcome] | None = connection.recv()
        except EOFError:
            if promised is None:
                raise SystemExit("a mutation itself failed, see above") from None
            died = replace(promised, category="died", reason="its process ended")
            yield died if promised.category == "hang" else promised
            return
        if message is None:
            return
        done, outcome = message
        promised = None if done else outcome
        if done:
            yield outcome
    if promised is not None:
        hung = replace(promised, reason=f"not done after {SECONDS_ALLOWED} s")
        yield hung if promised.category == "hang" else promised


def report(outcomes: Sequence[Outcome], seconds: float) -> None:
    """Print what was bad, each with how to see it again, and counts by mutation."""
    for outcome in outcomes:
        if outcome.category in BAD:
            mutant = f"mutant {outcome.number} of {outcome.model}"
            print(f"\n{outcome.category}: {mutant}, {outcome.mutation}: {outcome.recipe}")
            print(f"    {outcome.reason}")
    print_counts("", [(outcome.mutation, outcome.category) for outcome in outcomes], CATEGORIES)
    print(f"{len(outcomes)} mutants in {seconds:.0f} s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", action="append", default=[], metavar="GLOB", help="only group/name like this")
    parser.add_argument("--expected", action="append", choices=["inject", "either", "refuse"], help="default: inject")
    parser.add_argument("--only", type=int, action="append", help="only the mutant of this number; repeatable")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the mutants of --only there")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--resume", action="store_true", help="keep what is in OUT, and do the rest")
    return parser.parse_args()


def main() -> int:
    """Run the campaign, print, and return the exit code."""
    options = parse()
    entries = [
        entry
        for entry in find_entries(options.folders, groups=[], names=options.models)
        if entry.expected in (options.expected or ["inject"]) and not entry.damaged and entry.path.exists()
    ]
    if not entries:
        print("no model found: expected FOLDER/<group>/<name>/meta.json", file=sys.stderr)
        return 2
    numbers = options.only or range(options.first, options.first + options.mutants)
    if options.keep:
        for number in numbers:
            _keep(options.keep, *make(entries, options.seed, number))
    start = time.perf_counter()
    known = _done(options) if options.resume else []
    done = {outcome.number for outcome in known}
    left = [number for number in numbers if number not in done]
    save = partial(_save, options) if options.json else None
    outcomes = collect(campaign(entries, options.seed, left), save, known=known)
    report(outcomes, time.perf_counter() - start)
    return 1 if any(outcome.category in BAD for outcome in outcomes) else 0


def _save(options: argparse.Namespace, outcomes: Sequence[Outcome]) -> None:
    counts = Counter(outcome.category for outcome in outcomes)
    text = json.dumps({"seed": options.seed, "counts": counts, "outcomes": [asdict(one) for one in outcomes]}, indent=1)
    options.json.write_text(text, encoding="utf-8")


def _done(options: argparse.Namespace) -> list[Outcome]:
    """Return what an earlier run of the same seed has left."""
    if not (options.json and options.json.exists()):
        return []
    left = json.loads(options.json.read_text(encoding="utf-8"))
    if left["seed"] != options.seed:
        raise SystemExit(f"{options.json} is of seed {left['seed']}, not {options.seed}")
    return [Outcome(**one) for one in left["outcomes"]]


def _keep(folder: Path, entry: Entry, outcome: Outcome, mutant: Mutant | None) -> None:
    if mutant is not None:
        folder.mkdir(parents=True, exist_ok=True)
        data = mutant if isinstance(mutant, bytes) else mutant.SerializeToString()
        (folder / f"{outcome.number}-{entry.name}.onnx").write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
