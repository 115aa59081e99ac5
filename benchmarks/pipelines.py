"""Runs passes in rows drawn at random on models drawn at random: is each result the same, lossy on purpose, or refused?

    python benchmarks/pipelines.py FOLDER... [--rows N] [--seed S] [--only NUMBER] [--json OUT]

Everything is drawn from the seed: row NUMBER of a seed is the same one whatever else is run. Ends with 1 if a result
differs, cannot be run, or a pass raised what it did not mean to.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from coverage import quiet
from verification.corpus import Entry, find_entries

from kvsurgeon import Pipeline
from kvsurgeon.errors import InternalError, KvsurgeonError, ParityError, PassError, RunError, UnsupportedError
from kvsurgeon.passes.contract import Unchanged
from kvsurgeon.workflow.run_and_save import run_and_save

BAD = frozenset({"different", "does not run", "traceback"})
CATEGORIES = ("same", "lossy", "unchanged", "refused", *sorted(BAD))
LONGEST = 3  # passes in a row
WITH_A_CACHE = 0.75  # of the rows

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
    ("merge-kv-heads", ("{kv-heads=1}", "{kv-heads=2,method=first}"), 2),
    ("share-kv-layers", ("{kv-layers=1}",), 2),
    ("window-cache", ("", "{window=6,sinks=2}"), 2),
    ("latent-cache", ("",), 1),
    ("quantize-cache", ("", "{bits=4}", "{bits=4,hadamard=true}"), 2),
    ("add-position-ids", ("",), 2),
    ("raise-opset", ("{opset=21}", "{opset=23}", "{opset=24}"), 2),
    ("fix-shapes", ("{tokens=4,max-length=96}", "{tokens=1,max-length=96}"), 1),
    ("last-logits", ("",), 1),
    ("add-query-lengths", ("",), 1),
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


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one pipeline."""

    number: int
    model: str
    row: str
    category: str
    said: str = ""
    seconds: float = 0.0


def drawn(entries: Sequence[Entry], seed: int, number: int) -> tuple[Entry, str]:
    """Return the model and the passes of one number."""
    random = Random(f"{seed}/{number}")
    entry = random.choice(entries)
    chosen = random.choices(PASSES, [weight for *_, weight in PASSES], k=random.randint(1, LONGEST))
    if random.random() < WITH_A_CACHE:
        chosen.insert(random.randrange(len(chosen)), PASSES[0])
    return entry, ",".join(f"{name}{random.choice(options)}" for name, options, _ in chosen)


def examine(entry: Entry, number: int, row: str) -> Outcome:
    """Run the passes on the model, and verify the result."""
    start = time.perf_counter()
    category, said = _tried(entry, row)
    seconds = time.perf_counter() - start
    return Outcome(number=number, model=entry.label, row=row, category=category, said=said, seconds=seconds)


def _tried(entry: Entry, row: str) -> tuple[str, str]:
    passes = Pipeline.parse(row)
    try:
        done = run_and_save(entry.path, passes)
    except ParityError as error:
        return "different", str(error)
    except RunError as error:
        return "does not run" if error.exit_code != UnsupportedError.exit_code else "refused", str(error)
    except (PassError, InternalError) as error:
        return "refused" if isinstance(error.__cause__, KvsurgeonError) else "traceback", str(error)
    except KvsurgeonError as error:
        return "refused", str(error)
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    if all(isinstance(step.outcome, Unchanged) for step in done.steps):
        return "unchanged", ""
    return ("lossy" if done.verification is None else "same"), ""


def report(outcomes: Sequence[Outcome]) -> None:
    """Print what was bad, each with how to see it again, and counts by pass."""
    for one in outcomes:
        if one.category in BAD:
            print(f"\n{one.category}: row {one.number} on {one.model}: {one.row}\n    {one.said[:400]}")
    print(f"\n{'':20}", *(f"{category:>13}" for category in CATEGORIES))
    for name in [*(name for name, *_ in PASSES), "all"]:
        counts = Counter(one.category for one in outcomes if name == "all" or name in one.row)
        print(f"{name:20}", *(f"{counts[category] or '.':>13}" for category in CATEGORIES))


def main() -> int:
    """Run all rows, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, action="append", help="only the row of this number; repeatable")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    quiet()
    found = find_entries(options.folders, groups=[], names=[])
    entries = [one for one in found if one.expected == "inject" and not one.damaged]
    outcomes = []
    for number in options.only or range(options.rows):
        entry, row = drawn(entries, options.seed, number)
        outcomes.append(examine(entry, number, row))
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in outcomes], indent=1), encoding="utf-8")
    report(outcomes)
    return 1 if any(one.category in BAD for one in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
