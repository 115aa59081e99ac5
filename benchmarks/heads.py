"""Give every model of a corpus every possible number of KV heads, and compare the logits.

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
from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort
from verification.corpus import Case, Entry, find_entries
from verification.independent_verifier import BRAIN, bound_of, failures, open_session, read_contract, score_case
from verification.merged_weights import UnknownAttentionError, with_merged_weights
from verification.widening import widened

from kvsurgeon import io
from kvsurgeon.analysis.analysis import analyze
from kvsurgeon.decompose import decompose
from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.heads.counts import HeadCounts, counts_of
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Pass, Subject
from kvsurgeon.passes.heads.expand_gqa import ExpandGqa
from kvsurgeon.passes.heads.merge_kv_heads import MergeKvHeads
from kvsurgeon.passes.heads.replicate_kv_heads import ReplicateKvHeads, valid_counts
from kvsurgeon.workflow.pipeline import Pipeline

Method = Literal["mean", "first"]
KINDS = ("replicate-kv-heads", "expand-gqa", "inject", "merge back", "merge-kv-heads", "as numpy")
INTEGERS = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of one pipeline on one model."""

    label: str
    pipeline: str
    verdict: str  # right, wrong, refused, crashed; unknown where the reference cannot be made
    reason: str = ""


def counts(entry: Entry) -> HeadCounts:
    """Return the heads of a model's first layer."""
    analysis = analyze(decompose(io.load(entry.path)).model)
    return counts_of(analysis.flow, analysis.sites[0])


def run(entry: Entry, *passes: Pass) -> onnx.ModelProto:
    """Return the model after these passes."""
    return io.to_proto(Pipeline(passes).run(Subject.of(entry.path).model, folder=entry.folder).model)


def grouped(entry: Entry, heads: HeadCounts) -> Iterator[tuple[str, tuple[Pass, ...]]]:
    """Pipelines for a model in which query heads share key heads."""
    changes: list[tuple[str, Pass]] = [("expand-gqa", ExpandGqa())]
    legal = valid_counts(heads)[1:]
    changes += [(f"replicate-kv-heads {count}", ReplicateKvHeads(kv_heads=count)) for count in legal]
    method = _method(entry)
    for count in legal:
        back = MergeKvHeads(kv_heads=heads.kv_heads, method=method)
        yield f"replicate-kv-heads {count} and merge back", (ReplicateKvHeads(kv_heads=count), back, Inject())
    for name, change in changes:
        yield f"{name}, inject", (change, Inject())
        yield f"inject, {name}", (Inject(), change)


def compare_with_references(entry: Entry, model: onnx.ModelProto, cases: Sequence[Case] | None = None) -> str:
    """Return what is wrong with a model with a cache; nothing where it is right."""
    original = onnx.load(entry.path, load_external_data=False)
    session = _session(entry, model)
    contract = read_contract(session, original)
    found = entry.cases(original) if cases is None else cases
    scores = [score for case in found for score in score_case(session, contract, case)]
    return "; ".join(f"{bad.chunking}: {bad.error:.1e}" for bad in failures(scores, bound_of(original)))


def merged(entry: Entry, count: int, method: Method) -> str:
    """Return what is wrong with merged heads: with a cache, and replicated and merged again."""
    original = onnx.load(entry.path, load_external_data=False)
    merge = MergeKvHeads(kv_heads=count, method=method)
    cases = _with_reference(entry, run(entry, merge), entry.cases(original))
    again = run(entry, merge, ReplicateKvHeads(repeat=2), merge)
    apart = _apart(entry, again, cases)
    if apart > bound_of(original).error:
        return f"replicated and merged again: {apart:.1e}"
    return compare_with_references(entry, run(entry, merge, Inject()), cases)


def as_numpy(entry: Entry, heads: int, count: int) -> str:
    """Return the differences between merged heads and weights that numpy merged."""
    original = onnx.load(entry.path, load_external_data=False)
    reference = with_merged_weights(original, entry.folder, heads, count)
    apart = _apart(
        entry, run(entry, MergeKvHeads(kv_heads=count)), _with_reference(entry, reference, entry.cases(original))
    )
    return f"not what numpy merges: {apart:.1e}" if apart > bound_of(original).error else ""


def _with_reference(entry: Entry, model: onnx.ModelProto, cases: Sequence[Case]) -> list[Case]:
    return [dataclasses.replace(case, reference=_logits(entry, model, case)) for case in cases]


def _apart(entry: Entry, model: onnx.ModelProto, cases: Sequence[Case]) -> float:
    """Largest difference between a model without a cache and the references, over their spread."""
    each = (np.abs(_logits(entry, model, case) - case.reference)[case.real] / np.ptp(case.reference) for case in cases)
    return max((float(one.max()) for one in each), default=0.0)


def _logits(entry: Entry, model: onnx.ModelProto, case: Case) -> np.ndarray:
    session = _session(entry, model)
    names = {one.name for one in session.get_inputs()}
    found = session.run(None, {name: array for name, array in case.inputs.items() if name in names})
    return np.asarray(found[0], dtype=np.float32)


def _session(entry: Entry, model: onnx.ModelProto) -> ort.InferenceSession:
    return open_session(widened(model, entry.folder) if bound_of(model) is BRAIN else model, entry.folder)


def tried(label: str, pipeline: str, attempt: object) -> Result:
    """Return what became of an attempt."""
    assert callable(attempt)
    try:
        wrong = attempt()
    except KvsurgeonError as error:
        return Result(label=label, pipeline=pipeline, verdict="refused", reason=str(error))
    except UnknownAttentionError as error:
        return Result(label=label, pipeline=pipeline, verdict="unknown", reason=str(error))
    except Exception as error:
        return Result(label=label, pipeline=pipeline, verdict="crashed", reason=f"{type(error).__name__}: {error}")
    return Result(label=label, pipeline=pipeline, verdict="wrong" if wrong else "right", reason=wrong)


def examined(entry: Entry) -> Iterator[Result]:
    """Try every count that a model can have."""
    try:
        heads = counts(entry)
    except KvsurgeonError as error:
        yield Result(label=entry.label, pipeline="analyze", verdict="refused", reason=str(error))
        return
    if heads.kv_heads < heads.heads:
        for name, passes in grouped(entry, heads):
            yield tried(entry.label, name, lambda passes=passes: compare_with_references(entry, run(entry, *passes)))
        return
    method = _method(entry)
    for count in (count for count in range(1, heads.kv_heads) if heads.kv_heads % count == 0):
        yield tried(entry.label, f"merge-kv-heads {count}, {method}", lambda count=count: merged(entry, count, method))
        if method == "mean":
            yield tried(entry.label, f"as numpy {count}", lambda count=count: as_numpy(entry, heads.kv_heads, count))


def _method(entry: Entry) -> Method:
    """Return the method for merging heads: quantized weights have no mean."""
    quantized = onnx.load(entry.path, load_external_data=False).graph.initializer
    whole = sum(int(np.prod(one.dims)) for one in quantized if one.data_type in INTEGERS and len(one.dims) > 1)
    return "first" if whole > 1000 else "mean"


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
    for kind in KINDS:
        mine = [result for result in results if kind in result.pipeline]
        verdicts = Counter(result.verdict for result in mine)
        models = {result.label for result in mine}
        whole = models - {result.label for result in mine if result.verdict != "right"}
        print(f"{kind}: {len(whole)} of {len(models)} models whole; attempts: {dict(verdicts)}")
    print("not analyzed:", sum(result.pipeline == "analyze" for result in results))


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
