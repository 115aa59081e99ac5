"""Measure what passes for smaller caches lose on a text, and the bytes of the cache while the results run.

python benchmarks/help_topics.py MODEL/tokenizer.json -o topics.txt
python benchmarks/smaller_caches.py MODEL... --text topics.txt [--only PASSES] [--tokens 1024] [--json OUT]

Each pipeline runs as by its command: calibrated on the first half of the text, verified against the same weights in an
unchanged graph, measured on up to 4,096 tokens of the second half. Ends with 1 if perplexity rises by more than its
limit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from kvsurgeon import Pipeline
from kvsurgeon.parity import AccuracyLoss
from kvsurgeon.runtime import CachedDecoder, open_session
from kvsurgeon.workflow.run_and_save import run_and_save

LIMITS = {  # perplexity of SmolLM2-135M, as a multiple of that of the original
    "inject,quantize-cache": 1.01,
    "inject,quantize-cache{bits=4,hadamard=true}": 1.15,
    "inject,window-cache{window=128,sinks=32}": 1.12,
    "merge-kv-heads{kv-heads=1},inject": 12.0,
    "low-rank-values{rank=96},inject": 1.6,
    "swiftkv{after=22},inject": 1.2,
    "swiftkv{after=15},inject": 2.2,
}
CHUNK = 256  # tokens of a call


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result of one pipeline."""

    model: str
    passes: str
    loss: AccuracyLoss
    limit: float | None
    cache_bytes: int  # after `tokens` tokens
    tokens: int

    @property
    def factor(self) -> float:
        """Perplexity, as a multiple of that of the original."""
        return self.loss.candidate_perplexity / self.loss.reference_perplexity


def measure(model: Path, passes: str, text: Path, tokens: int) -> Row:
    """Run a pipeline as its command does, and then the result."""
    with tempfile.TemporaryDirectory(dir=text.parent) as folder:
        run = run_and_save(model, Pipeline.parse(passes), folder, text=text, link_weights=True, effort="quick")
        assert run.loss is not None
        size = cache_bytes(Path(folder), tokens)
    return Row(
        model=str(model), passes=passes, loss=run.loss, limit=LIMITS.get(passes), cache_bytes=size, tokens=tokens
    )


def cache_bytes(folder: Path, tokens: int) -> int:
    """Return the bytes of the arrays that a model returns as its cache after so many tokens."""
    decoder = CachedDecoder(open_session(folder))
    ids = np.random.default_rng(0).integers(0, 1000, (1, tokens))
    feeds = decoder.inputs.feeds(ids, np.ones_like(ids))
    for start in range(0, tokens, CHUNK):
        decoder.step(decoder.inputs.part(feeds, start, min(start + CHUNK, tokens)))
    return sum(decoder.cached_rows(entry).nbytes for entry in decoder.cache)


def report(rows: Sequence[Row]) -> int:
    """Print a row of a table for each result, and return how many are above their limit."""
    for row in rows:
        print(
            f"| {Path(row.model).name} | `{row.passes}` | {row.factor:.3f} | {row.limit or '-'} | "
            f"{row.loss.kl_divergence:.3f} | {row.loss.agreement:.1%} | {row.cache_bytes / 2**20:.2f} MiB |",
            flush=True,
        )  # fmt: skip
    return sum(row.limit is not None and not row.factor <= row.limit for row in rows)


def main() -> int:
    """Run the command line, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--only", action="append", metavar="PASSES", help="a pipeline instead of LIMITS; repeatable")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens after which the cache is measured")
    parser.add_argument("--json", type=Path, metavar="OUT")
    given = parser.parse_args()
    rows, above = [], 0
    for model in given.models:
        for passes in given.only or LIMITS:
            rows.append(measure(model, passes, given.text, given.tokens))
            above += report(rows[-1:])
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
