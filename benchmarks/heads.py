"""Gives every model of a corpus every number of key and value heads that it can have, and judges the logits.

    python benchmarks/heads.py CORPUS [--group G] [--name N] [--part 1/3] [--journal FILE]

With fewer key heads than query heads: replicated to every legal count and expanded, before `inject` and after it, by
the stored logits. With as many: merged to every legal count, with a cache against itself without; replicated and
merged again, that must be the merged model. A journal holds a line for each attempt; models that it has are not tried
again, so that a sweep can be cut off and gone on with, or done in parts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from witness.corpus import Case, Entry, find_entries
from witness.second_judge import bound_of, failures, judge, open_session, read_contract

from kvsurgeon import io
from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.graph.plain import in_plain_words
from kvsurgeon.heads.counts import HeadCounts, counts_of
from kvsurgeon.passes.contract import Pass, Subject
from kvsurgeon.passes.expand_gqa import ExpandGqa
from kvsurgeon.passes.inject import Inject
from kvsurgeon.passes.merge_kv_heads import MergeKvHeads
from kvsurgeon.passes.replicate_kv_heads import ReplicateKvHeads, legal_counts
from kvsurgeon.pipeline import Pipeline
from kvsurgeon.sequence.analysis import analyse


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one model with one pipeline."""

    label: str
    pipeline: str
    verdict: str  # right, wrong, refused, crashed
    reason: str = ""


def counts(entry: Entry) -> HeadCounts:
    """Return the heads of a model's first layer."""
    analysis = analyse(in_plain_words(io.load(entry.path)))
    return counts_of(analysis.flow, analysis.heads[0])


def run(entry: Entry, *passes: Pass) -> onnx.ModelProto:
    """Return the model after these passes."""
    return io.to_proto(Pipeline(passes).run(Subject.of(entry.path).model, folder=entry.folder).model)


def grouped(entry: Entry, heads: HeadCounts) -> Iterator[tuple[str, tuple[Pass, ...]]]:
    """Pipelines for a model in which query heads share key heads."""
    changes: list[tuple[str, Pass]] = [("expand-gqa", ExpandGqa())]
    legal = legal_counts(heads)[1:]
    changes += [(f"replicate-kv-heads {count}", ReplicateKvHeads(kv_heads=count)) for count in legal]
    for name, change in changes:
        yield f"{name}, inject", (change, Inject())
        yield f"inject, {name}", (Inject(), change)


def judged(entry: Entry, model: onnx.ModelProto, cases: Sequence[Case] | None = None) -> str:
    """Return what is wrong with a model with a cache; nothing where it is right."""
    original = onnx.load(entry.path, load_external_data=False)
    session = open_session(model, entry.folder)
    contract = read_contract(session, original)
    found = entry.cases(original) if cases is None else cases
    scores = [score for case in found for score in judge(session, contract, case)]
    return "; ".join(f"{bad.way}: {bad.error:.1e}" for bad in failures(scores, bound_of(original)))


def merged(entry: Entry, count: int) -> str:
    """Return what is wrong with merged heads: with a cache, and replicated and merged again."""
    original = onnx.load(entry.path, load_external_data=False)
    alone = run(entry, MergeKvHeads(kv_heads=count))
    cases = [dataclasses.replace(case, reference=_logits(entry, alone, case)) for case in entry.cases(original)]
    again = run(entry, MergeKvHeads(kv_heads=count), ReplicateKvHeads(repeat=2), MergeKvHeads(kv_heads=count))
    apart = [np.abs(_logits(entry, again, case) - case.reference).max() / np.ptp(case.reference) for case in cases]
    if max(apart, default=0.0) > bound_of(original).error:
        return f"replicated and merged again: {max(apart):.1e}"
    return judged(entry, run(entry, MergeKvHeads(kv_heads=count), Inject()), cases)


def _logits(entry: Entry, model: onnx.ModelProto, case: Case) -> np.ndarray:
    session = open_session(model, entry.folder)
    names = {one.name for one in session.get_inputs()}
    found = session.run(None, {name: array for name, array in case.inputs.items() if name in names})
    return np.asarray(found[0], dtype=np.float32)


def tried(label: str, pipeline: str, attempt: object) -> Result:
    """Return what became of an attempt."""
    assert callable(attempt)
    try:
        wrong = attempt()
    except KvsurgeonError as error:
        return Result(label=label, pipeline=pipeline, verdict="refused", reason=str(error))
    except Exception as error:
        return Result(label=label, pipeline=pipeline, verdict="crashed", reason=f"{type(error).__name__}: {error}")
    return Result(label=label, pipeline=pipeline, verdict="wrong" if wrong else "right", reason=wrong)


def examined(entry: Entry) -> Iterator[Result]:
    """Try every count that a model can have."""
    try:
        heads = counts(entry)
    except KvsurgeonError as error:
        yield Result(label=entry.label, pipeline="analyse", verdict="refused", reason=str(error))
        return
    if heads.kv_heads < heads.heads:
        for name, passes in grouped(entry, heads):
            yield tried(entry.label, name, lambda passes=passes: judged(entry, run(entry, *passes)))
        return
    for count in range(1, heads.kv_heads):
        if heads.kv_heads % count == 0:
            yield tried(entry.label, f"merge-kv-heads {count}", lambda count=count: merged(entry, count))


def main() -> int:
    """Sweep; exit code 1 where something is wrong or crashed."""
    given = _arguments()
    results = _read(given.journal)
    known = {result.label for result in results}
    number, parts = (int(word) for word in given.part.split("/"))
    entries = find_entries([given.corpus], groups=given.group, names=given.name)
    for entry in [entry for entry in entries if entry.expected == "inject"][number - 1 :: parts]:
        if entry.label in known:
            continue
        found = list(examined(entry)) or [Result(label=entry.label, pipeline="none", verdict="right")]
        results += found
        _write(given.journal, found)
        for result in found:
            if result.verdict != "right":
                print(result.label, result.pipeline, result.verdict, result.reason[:200], flush=True)
    print_tally(results)
    return int(any(result.verdict in ("wrong", "crashed") for result in results))


def print_tally(results: Sequence[Result]) -> None:
    """Print how many attempts, and how many models with all of their counts, came out right."""
    for kind in ("replicate-kv-heads", "expand-gqa", "merge-kv-heads"):
        mine = [result for result in results if kind in result.pipeline]
        verdicts = Counter(result.verdict for result in mine)
        models = {result.label for result in mine}
        whole = models - {result.label for result in mine if result.verdict != "right"}
        print(f"{kind}: {len(whole)} of {len(models)} models whole; attempts: {dict(verdicts)}")
    print("not analysed:", sum(result.pipeline == "analyse" for result in results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--group", action="append", default=[])
    parser.add_argument("--name", action="append", default=[])
    parser.add_argument("--part", default="1/1", help="of the models, as 2/3")
    parser.add_argument("--journal", type=Path)
    return parser.parse_args()


def _read(journal: Path | None) -> list[Result]:
    if journal is None or not journal.exists():
        return []
    return [Result(**json.loads(line)) for line in journal.read_text(encoding="utf-8").splitlines()]


def _write(journal: Path | None, results: Sequence[Result]) -> None:
    if journal is not None:
        with journal.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(dataclasses.asdict(result)) + "\n" for result in results)


if __name__ == "__main__":
    sys.exit(main())
