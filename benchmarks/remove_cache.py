"""Remove and restore caches, and check that each model computes the same.

    python benchmarks/remove_cache.py FOLDER... [--cache NAME]... [--file MODEL]... [--group G] [--only NAME]
                                      [--sample N] [--json OUT]

Two sequences. *inject, remove-cache, inject*: every model of a folder that can be injected, in each given cache mode
(by default all); compared with the original without the cache, and with the stored logits with a dynamic one.
*remove-cache, inject*: every file called `*with_past*.onnx`, and each FILE; the cache is restored with its names and
compared with the file, call by call, and with the stored logits. A cache that cannot be removed is refused by name.
Ends with 1 if anything differs or crashes, or an injected dynamic cache cannot be removed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from verification.corpus import Case, Entry, corpus_parser, find_entries, spread_sample
from verification.independent_verifier import BRAIN, bound_of, failures, open_session, read_contract, score_case
from verification.widening import widened

from kvsurgeon import io
from kvsurgeon.errors import KvsurgeonError, ParityError, UnsupportedError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import RemoveCache, detach_cache, reattach_cache
from kvsurgeon.passes.contract import Changed, Outcome, Subject
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

FINE = frozenset({"equal", "not injected", "not runnable", "refused by name"})
CACHE_MODES: dict[str, dict[str, str]] = {
    "dynamic": {},
    "static": {"cache": "static"},
    "new-tokens": {"cache": "new-tokens"},
    "unfilled": {"cache": "new-tokens", "past_length": "input"},
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of one model."""

    name: str
    verdict: str
    reason: str = ""


def main() -> int:
    arguments = _arguments()
    found = find_entries(arguments.folders, groups=arguments.group, names=arguments.only)
    entries = [one for one in spread_sample(found, arguments.sample) if one.expected != "refuse" and not one.damaged]
    results_by_sequence = {
        f"inject {cache_mode}, remove-cache, inject": [
            _named(entry.label, lambda entry=entry, cache_mode=cache_mode: _there_and_back(entry, cache_mode))
            for entry in entries
        ]
        for cache_mode in arguments.cache or CACHE_MODES
    } | {
        "remove-cache, inject": [
            _named(f"{entry.label}/{file.name}", lambda entry=entry, file=file: _replaced(file, entry))
            for entry in found
            for file in sorted(entry.folder.glob("*with_past*.onnx"))
        ]
        + [_named(str(file), lambda file=file: _replaced(file, None)) for file in arguments.file],
    }
    for sequence, results in results_by_sequence.items():
        counts = Counter(result.verdict for result in results)
        print(
            f"{sequence}: {len(results)} models, "
            + ", ".join(f"{count} {what}" for what, count in counts.most_common())
        )
        for result in results:
            if result.verdict not in FINE:
                print(f"  {result.verdict}  {result.name}  {result.reason}")
    if arguments.json:
        report = {sequence: [asdict(result) for result in results] for sequence, results in results_by_sequence.items()}
        arguments.json.write_text(json.dumps(report, indent=1), "utf-8")
    return 0 if all(result.verdict in FINE for results in results_by_sequence.values() for result in results) else 1


def _named(name: str, attempt: Callable[[], tuple[str, str]]) -> Result:
    try:
        verdict, reason = attempt()
    except Exception as error:
        kind = {UnsupportedError: "refused", ParityError: "different"}.get(type(error), "crashed")
        verdict, reason = kind, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(f"{verdict:>14}  {name}", file=sys.stderr)
    return Result(name=name, verdict=verdict, reason=reason)


def _there_and_back(entry: Entry, cache_mode: str) -> tuple[str, str]:
    original = onnx.load(entry.path, load_external_data=False)
    subject = Subject.of(onnx.load(entry.path, load_external_data=False), entry.folder)
    try:
        Inject(**CACHE_MODES[cache_mode]).apply(subject)
    except KvsurgeonError as error:
        return "not injected", str(error)
    try:
        if not isinstance(RemoveCache().apply(subject), Changed):
            return "different", "the injected cache is not recognized"
    except UnsupportedError as refusal:
        return "refused" if cache_mode == "dynamic" else "refused by name", str(refusal)
    without_cache = io.to_proto(subject.model)
    for mine, theirs in (
        (without_cache.graph.input, original.graph.input),
        (without_cache.graph.output, original.graph.output),
    ):
        if [value.name for value in mine] != [value.name for value in theirs]:
            return "different", f"it is left with {[value.name for value in mine]}"
    cases = entry.cases(original)
    try:
        expected = list(_whole(original, entry, cases))
    except Exception as error:
        return "not runnable", str(error)
    for one, other in zip(expected, _whole(without_cache, entry, cases), strict=True):
        error = float(np.abs(one - other).max() / max(np.ptp(one), 1e-30))
        if not error <= bound_of(original).error:
            return "different", f"off by {error:.1e} of the spread without the cache"
    Inject().apply(subject)
    return _verified(original, io.to_proto(subject.model), entry, cases)


def _whole(model: onnx.ModelProto, entry: Entry, cases: list[Case]) -> Iterator[np.ndarray]:
    """Logits of each case, given whole to a model without a cache."""
    session = open_session(widened(model, entry.folder) if bound_of(model) is BRAIN else model, entry.folder)
    for case in cases:
        names = [value.name for value in session.get_inputs()]
        (logits,) = session.run([session.get_outputs()[0].name], {name: case.inputs[name] for name in names})
        yield np.where(case.real.reshape(*case.real.shape, *[1] * (logits.ndim - 2)), logits, 0).astype(np.float64)


def _verified(original: onnx.ModelProto, result: onnx.ModelProto, entry: Entry, cases: list[Case]) -> tuple[str, str]:
    bound = bound_of(original)
    session = open_session(widened(result, entry.folder) if bound is BRAIN else result, entry.folder)
    contract = read_contract(session, original)
    failed = failures([score for case in cases for score in score_case(session, contract, case)], bound)
    return ("different", f"{failed[0].chunking}: error {failed[0].error:.1e}") if failed else ("equal", "")


@dataclass(frozen=True)
class OutAndIn:
    """Take the cache out and put it back under the names that it had."""

    name = "out-and-in"

    def apply(self, subject: Subject) -> Outcome:
        signature = detach_cache(subject)
        assert signature is not None
        return reattach_cache(subject, signature)


def _replaced(file: Path, entry: Entry | None) -> tuple[str, str]:
    before = onnx.load(file, load_external_data=False)
    surgery = run_and_save(file, Pipeline((OutAndIn(),)))
    result = io.to_proto(surgery.model)
    for mine, theirs in ((result.graph.input, before.graph.input), (result.graph.output, before.graph.output)):
        if {value.name for value in mine} != {value.name for value in theirs}:
            return "different", f"it is left with {[value.name for value in mine]}"
    if entry is None:
        return "equal", ""
    original = onnx.load(entry.path, load_external_data=False)
    return _verified(original, result, entry, entry.cases(original))


def _arguments() -> argparse.Namespace:
    parser = corpus_parser(__doc__)
    parser.add_argument("--cache", action="append", choices=CACHE_MODES)
    parser.add_argument("--file", action="append", type=Path, default=[])
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
