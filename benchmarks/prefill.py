"""Time of a prompt with `prefill.onnx`, next to that of a model without it: alternating runs, medians.

kvsurgeon run model -p inject -o cached
kvsurgeon run model -p "swiftkv{after=15},inject,separate-prefill" --text text.txt -o split
python benchmarks/prefill.py cached split --tokens 1024
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from kvsurgeon.runtime import Array, CachedDecoder, open_session
from kvsurgeon.runtime.tensors import from_runtime, to_runtime


class SplitModel:
    """A model and its `prefill.onnx`."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.decoder = CachedDecoder(open_session(folder / "model.onnx", threads=threads))
        self.prefill = open_session(folder / "prefill.onnx", threads=threads)
        self.model = self.decoder.session

    def logits(self, tokens: Array) -> Array:
        """Return the logits of the last token of a prompt."""
        feeds, count = self.decoder.inputs.feeds(tokens, np.ones_like(tokens)), tokens.shape[1]
        pasts = {
            entry.past.name: np.zeros(
                [dim if isinstance(dim, int) else int(place == 0) for place, dim in enumerate(entry.past.dims)],
                entry.past.dtype,
            )
            for entry in self.decoder.cache
        }
        names = {one.name for one in self.prefill.inputs}
        first = {**self.decoder.inputs.part(feeds, 0, count - 1), **pasts}
        found = self.prefill.run({name: to_runtime(array) for name, array in first.items() if name in names})
        last = {name: to_runtime(array) for name, array in self.decoder.inputs.part(feeds, count - 1, count).items()}
        last |= {entry.past.name: found[entry.present] for entry in self.decoder.cache}
        return from_runtime(self.model.run(last)[self.decoder.logits])[:, -1]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("whole", type=Path, help="Folder of a model with a cache.")
    parser.add_argument("split", type=Path, help="Folder of a model with a cache and prefill.onnx.")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    whole = CachedDecoder(open_session(given.whole / "model.onnx", threads=given.threads))
    split = SplitModel(given.split, given.threads)
    tokens = np.random.default_rng(0).integers(0, 1000, (1, given.tokens))
    feeds = whole.inputs.feeds(tokens, np.ones_like(tokens))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(given.runs + 1):  # the first one is not counted
        for seconds, run in zip(times, (lambda: whole.prefill(feeds), lambda: split.logits(tokens)), strict=True):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    before, after = (statistics.median(seconds[1:]) for seconds in times)
    print(f"{given.tokens} tokens: {before:.3f} s whole, {after:.3f} s with prefill.onnx, {after / before:.2f} times")


if __name__ == "__main__":
    main()
