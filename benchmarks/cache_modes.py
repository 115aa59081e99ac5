"""Whether the three cache modes of a cache agree with each other, on models with stored reference logits.

    python benchmarks/cache_modes.py FOLDER... [--sample N] [--group G] [--only NAME] [--json OUT]

Each model of a corpus (see `coverage.py`) gets a cache in each mode; each is run on the stored texts, left
padding included: prefill of half, then single tokens, a chunk, and single tokens again. Rows that no token was written
to hold sevens. What is compared is the logits of all pairs of cache modes, at positions that are not padding, over the
spread of the logits of the one that grows; and each with the reference.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnx
from verification.corpus import Case, Entry, corpus_parser, find_entries, spread_sample

from kvsurgeon import io
from kvsurgeon.errors import KvsurgeonError, UnsupportedError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject
from kvsurgeon.runtime import CachedDecoder, open_session

CACHE_MODES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache": "static"},
    "static, copied rows": {"cache": "static", "past_length": "mask"},
    "new-tokens": {"cache": "new-tokens"},
    "new-tokens, unfilled rows": {"cache": "new-tokens", "past_length": "input"},
}
ALLOWED = 1e-4


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Largest difference between the cache modes of one model."""

    label: str
    family: str
    padded: bool
    apart: float = 0.0  # the largest difference of two cache modes, over the spread
    reference: float = 0.0  # the largest difference of one from the reference
    refused: Mapping[str, str] = field(default_factory=dict)


def compare(entry: Entry) -> Agreement:
    """Return how far the cache modes of a model are apart on all its stored texts.

    Raises:
        KvsurgeonError: It cannot be given a cache that grows, or one of them cannot be run.
    """
    original = onnx.load(entry.path, load_external_data=False)
    cases = entry.cases(original)
    decoders, refused = {}, {}
    for cache_mode, options in CACHE_MODES.items():
        subject = Subject.of(entry.path)
        try:
            Inject(**options).apply(subject)
        except UnsupportedError as refusal:
            if cache_mode in ("dynamic", "static", "new-tokens"):
                raise
            refused[cache_mode] = str(refusal)
            continue
        decoders[cache_mode] = CachedDecoder(open_session(io.to_proto(subject.model), folder=entry.folder, threads=1))
    apart, reference = 0.0, 0.0
    for case in cases:
        found = {cache_mode: logits(decoder, case) for cache_mode, decoder in decoders.items()}
        scale = float(np.ptp(found["dynamic"][case.real].astype(np.float64)))
        pairs = itertools.combinations(found.values(), 2)
        apart = max([apart, *(gap(one, other, case) / scale for one, other in pairs)])
        reference = max([reference, *(gap(one, case.reference, case) / scale for one in found.values())])
    padded = any(not case.real.all() for case in cases)
    return Agreement(
        label=entry.label, family=entry.family, padded=padded, apart=apart, reference=reference, refused=refused
    )


def logits(decoder: CachedDecoder, case: Case) -> np.ndarray:
    """Return the logits of all calls."""
    feeds = {given.name: case.inputs[given.name] for given in decoder.inputs.specs}
    decoder.reset()
    ends = [0, *cuts(case.total), case.total]
    steps = [decoder.step(decoder.inputs.part(feeds, past, total)) for past, total in itertools.pairwise(ends)]
    return np.concatenate(steps, axis=1)


def cuts(total: int) -> list[int]:
    """Return where the text is cut: half of it, single tokens, a chunk, and single tokens.

    >>> cuts(12)
    [6, 7, 8, 10, 11]
    """
    half = total // 2
    wanted = [half, half + 1, half + 2, total - 2, total - 1]
    return sorted({cut for cut in wanted if 0 < cut < total})


def gap(found: np.ndarray, expected: np.ndarray, case: Case) -> float:
    """Return the largest difference at positions that are not padding."""
    return float(np.abs(found.astype(np.float64) - expected.astype(np.float64))[case.real].max())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = corpus_parser(__doc__)
    options = parser.parse_args(arguments)
    entries = find_entries(options.folders, groups=options.group, names=options.only)
    entries = [entry for entry in entries if entry.expected == "inject" and (entry.folder / "io.npz").exists()]
    results = []
    for entry in spread_sample(entries, options.sample):
        try:
            found = compare(entry)
        except (KvsurgeonError, KeyError, ValueError) as error:
            print(f"{entry.label:60} not compared: {error}")
            continue
        results.append(found)
        note = "" if not found.refused else f"; refused: {', '.join(found.refused)}"
        print(f"{found.label:60} {found.apart:8.1e} apart, {found.reference:8.1e} from the reference{note}", flush=True)
    worst = max((found.apart for found in results), default=0.0)
    families, padded = {found.family for found in results}, sum(found.padded for found in results)
    print(f"\n{len(results)} models of {len(families)} families, {padded} with left padding: at most {worst:.1e} apart")
    if options.json:
        options.json.write_text(json.dumps([asdict(found) for found in results], indent=1), "utf-8")
    return int(worst > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
