"""Inject equivalent rewrites of models, and compare the results.

    python benchmarks/metamorphic.py FOLDER... [--sample 48] [--rewrite NAME] [--seed S] [--json OUT]

Each model is injected as it is and in every rewrite (see rewrites.py). The same means: refused in both, or as many
past inputs, and right by what the rewritten model itself gives, in one call, token by token and in ragged chunks,
left-padded batches included. Rewrites by tools that are not installed are left out. Ends with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import onnx
from coverage import examine, quiet
from mutating.mutant_run import seeded
from mutating.rewrites import BY_TOOLS, WRITTEN, Rewrite, everything, plain, simplified, slimmed, with_interface_of
from verification.corpus import Case, Entry, corpus_parser, find_entries, spread_sample
from verification.independent_verifier import open_session
from verification.uncached import answer, highest_level

import kvsurgeon

TOOLS = {slimmed: "onnxslim", simplified: "onnxsim"}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Result of injecting one rewrite of a model."""

    model: str
    rewrite: str
    verdict: str  # as in coverage.py, or "no such rewrite" where the model cannot be written so
    pasts: int = 0
    reason: str = ""


def ask(entry: Entry, rewrite: Rewrite, seed: int) -> Answer:
    """Return what becomes of a model in a rewrite."""
    blank = Answer(model=entry.label, rewrite=rewrite.__name__, verdict="no such rewrite")
    try:
        rewritten = rewrite(onnx.load(entry.path), seeded(seed, 0))
    except Exception as error:
        return replace(blank, reason=f"{type(error).__name__}: {error}"[:200])
    pasts = 0

    def inject(_entry: Entry) -> tuple[onnx.ModelProto, onnx.ModelProto]:
        nonlocal pasts
        original = onnx.load(entry.path, load_external_data=False)
        copy = onnx.ModelProto.FromString(rewritten.SerializeToString())
        injected = kvsurgeon.KeyValueCacheInjector(entry.folder).apply(copy)
        pasts = len(injected.graph.input) - len(rewritten.graph.input)
        return with_interface_of(_plain(rewritten), original), with_interface_of(injected, original)

    result = examine(_Rewritten(folder=entry.folder, meta=entry.meta), inject)
    return replace(blank, verdict=result.verdict, pasts=pasts, reason=result.reason)


class _Rewritten(Entry):
    """A model whose answers are its own: what rounds, rounds otherwise when it is written down differently."""

    def cases(self, original: onnx.ModelProto) -> list[Case]:
        stored = super().cases(original)
        try:
            session = open_session(original, self.folder, highest_level(original, self.folder))
            return [replace(case, reference=answer(session, case)) for case in stored]
        except Exception:  # onnxruntime lacks kernels; examine() knows what to say of it
            return stored


def _plain(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(model.SerializeToString())


def compare(entries: Sequence[Entry], rewrites: Sequence[Rewrite], seed: int) -> Iterator[tuple[Answer, Answer]]:
    """Yield for each model and rewrite what became of it without and with it."""
    for entry in entries:
        usual = ask(entry, plain, seed)
        for rewrite in rewrites:
            yield usual, ask(entry, rewrite, seed)


def differs(usual: Answer, other: Answer) -> bool:
    """Whether a rewrite made a difference."""
    return other.verdict != "no such rewrite" and (other.verdict, other.pasts) != (usual.verdict, usual.pasts)


def report(pairs: Sequence[tuple[Answer, Answer]], seconds: float) -> None:
    """Print what differs, and counts by rewrite."""
    for usual, other in pairs:
        if differs(usual, other):
            print(
                f"\n{other.model}, {other.rewrite}: {usual.verdict}, {usual.pasts} pasts; then {other.verdict}", end=""
            )
            print(f", {other.pasts} pasts\n    {other.reason}")
    print(f"\n{'':28}{'same':>8}{'right':>8}{'refused':>8}{'differs':>8}{'no such':>8}")
    for name in dict.fromkeys(other.rewrite for _, other in pairs):
        counts: Counter[str] = Counter()
        for usual, other in pairs:
            if other.rewrite == name:
                counts[other.verdict] += 1
                counts["differs" if differs(usual, other) else "same"] += other.verdict != "no such rewrite"
        columns = ("same", "right", "refused", "differs", "no such rewrite")
        print(f"{name:28}" + "".join(f"{counts[column] or '.':>8}" for column in columns))
    models = len({usual.model for usual, _ in pairs})
    print(
        f"{models} models, {len(pairs)} rewritten, {sum(differs(*pair) for pair in pairs)} differ, in {seconds:.0f} s"
    )


def parse() -> argparse.Namespace:
    parser = corpus_parser(__doc__, sample=48)
    parser.add_argument("--rewrite", action="append", default=[], metavar="NAME", help="only this one; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    """Rewrite, inject, compare, and return the exit code."""
    options = parse()
    quiet()
    entries = [
        entry
        for entry in find_entries(options.folders, groups=options.group, names=options.only)
        if entry.expected == "inject"
    ]
    known = [
        one for one in (*WRITTEN, everything, *BY_TOOLS) if one not in TOOLS or importlib.util.find_spec(TOOLS[one])
    ]
    rewrites = [one for one in known if not options.rewrite or one.__name__ in options.rewrite]
    start = time.perf_counter()
    pairs = list(compare(spread_sample(entries, options.sample), rewrites, options.seed))
    report(pairs, time.perf_counter() - start)
    if options.json:
        options.json.write_text(json.dumps([asdict(other) for _, other in pairs], indent=1), encoding="utf-8")
    return 1 if any(differs(*pair) for pair in pairs) else 0


if __name__ == "__main__":
    sys.exit(main())
