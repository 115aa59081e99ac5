"""Throughput of decode steps on sequences of different lengths in one static cache, compared with one at a time.

    kvsurgeon inject smollm2 --target genai-shared-buffer -o folder
    python benchmarks/continuous_batching.py folder [--tokens 32] [--rounds 3] [--threads 2]

Eight prompts of 3 to 200 random tokens are continued greedily, one at a time and side by side, in turns. The throughput
is the number of tokens of decode steps over their time; the first calls, which run a prompt each, are the same in both.
Ends with 1 if a token differs, or if the throughput is less than 4 times that of one at a time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvsurgeon.runtime import ContinuousBatch, open_session

LENGTHS = (3, 200, 17, 64, 5, 130, 9, 31)
GOAL = 4.0

Texts = list[list[int]]


def continued(batch: ContinuousBatch, prompts: Sequence[Sequence[int]], steps: int) -> tuple[Texts, float]:
    """Return the greedy continuations of prompts side by side, and the time of the decode steps."""
    texts: dict[int, list[int]] = {}
    for prompt in prompts:
        number, logits = batch.start(prompt)
        texts[number] = [int(logits[-1].argmax())]
    start = time.perf_counter()
    for _ in range(steps):
        logits = batch.step({number: text[-1] for number, text in texts.items()})
        for number, text in texts.items():
            text.append(int(logits[number].argmax()))
    seconds = time.perf_counter() - start
    for number in texts:
        batch.end(number)
    return list(texts.values()), seconds


def main() -> int:
    """Run both in turns, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    prompts = [random.integers(5, 1000, length).tolist() for length in LENGTHS]
    session = open_session(options.model, threads=options.threads)
    batch = ContinuousBatch(session, rows=len(prompts), capacity=max(LENGTHS) + options.tokens + 1)
    ratios, differs = [], False
    for _ in range(options.rounds):
        alone = [continued(batch, [prompt], options.tokens) for prompt in prompts]
        together, seconds = continued(batch, prompts, options.tokens)
        differs |= together != [texts[0] for texts, _ in alone]
        one_by_one, count = sum(seconds for _, seconds in alone), len(prompts) * options.tokens
        ratios.append(one_by_one / seconds)
        print(f"one at a time {count / one_by_one:.1f} tokens/s, side by side {count / seconds:.1f}")
    print(f"median {statistics.median(ratios):.2f} times; tokens {'differ' if differs else 'are equal'}")
    return int(differs or statistics.median(ratios) < GOAL)


if __name__ == "__main__":
    sys.exit(main())
