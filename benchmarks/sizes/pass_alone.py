"""Times the pass inside one process against what onnx-ir needs to load and save the same file; prints JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import onnx_ir as ir

from kvsurgeon.passes.contract import Subject
from kvsurgeon.workflow.pipeline import Pipeline


def load_and_save(model: Path, folder: Path) -> float:
    """Return the seconds that onnx-ir takes to read a graph and write it again."""
    start = time.perf_counter()
    ir.save(ir.load(model), folder / "again.onnx")
    return time.perf_counter() - start


def inject(model: Path) -> float:
    """Return the seconds that the pass takes, analysis included, on a graph that is loaded already."""
    subject = Subject.of(model)
    (one,) = Pipeline.parse("inject").passes
    start = time.perf_counter()
    one.apply(subject)
    return time.perf_counter() - start


def main() -> None:
    """Time both in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pairs = [(load_and_save(options.model, Path(folder)), inject(options.model)) for _ in range(options.repeat)]
    base, taken = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(json.dumps({"load_and_save_seconds": base, "pass_seconds": taken, "ratio": taken / base}))


if __name__ == "__main__":
    main()
