"""Time a decode step after short and long texts, and print the size of the cache: both are flat if all is states.

    python benchmarks/state_steps.py FOLDER... [--contexts 16 --contexts 8192] [--steps 400]

FOLDER holds a model with a cache, such as that of `examples/train_hybrid.py` after `inject` and `window-cache`. The
contexts take turns, one step each, on one thread. A cache of the last rows has no more than these; numbers are random.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

Feeds = dict[str, np.ndarray]


def feeds_of(session: ort.InferenceSession, context: int) -> Feeds:
    """Return the inputs of a step of one token after a text."""
    feeds: Feeds = {"input_ids": np.array([[5]])}
    for given in session.get_inputs():
        if given.name == "attention_mask":
            feeds[given.name] = np.ones((1, context + 1), np.int64)
        elif given.name.startswith("past_"):
            sizes = [_size(dimension, axis, context) for axis, dimension in enumerate(given.shape)]
            feeds[given.name] = 0.1 * np.random.default_rng(0).standard_normal(sizes).astype(np.float32)
    return feeds


def _size(dimension: int | str, axis: int, context: int) -> int:
    """Return the size of an axis of the cache: one sequence, and the rows of a text."""
    if isinstance(dimension, int):
        return dimension
    rows = re.search(r"last_(\d+)_rows", dimension)
    return 1 if axis == 0 else min(context, int(rows[1])) if rows else context


def main() -> None:
    """Time each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--contexts", type=int, action="append")
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    for folder in arguments.folders:
        session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        texts = {context: feeds_of(session, context) for context in arguments.contexts or (16, 8192)}
        times: dict[int, list[float]] = {context: [] for context in texts}
        for _ in range(arguments.steps):
            for context, feeds in texts.items():
                start = time.perf_counter()
                session.run(None, feeds)
                times[context].append(1e3 * (time.perf_counter() - start))
        for context, found in times.items():
            size = sum(array.nbytes for name, array in texts[context].items() if name.startswith("past_")) / 1024
            spread = f"shortest {min(found):.3f} ms, median {statistics.median(found):.3f} ms"
            print(f"{folder.name}: {spread} a step after {context} tokens, {size:.0f} KiB of cache")


if __name__ == "__main__":
    main()
