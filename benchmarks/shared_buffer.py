"""Times one decode step in place: past and present of each entry bound to one buffer with capacity for more tokens.

    kvsurgeon run smollm2 -p "raise-opset{opset=24},inject{cache=static}" -o in-place
    python -m onnxruntime_genai.models.builder -i HUGGING_FACE_FOLDER -o built -p fp32 -e cpu
    python benchmarks/inplace.py built static [--context 1024] [--capacity 2048] [--steps 20] [--json OUT]

Every model is run the same way: through an `IOBinding` on values made beforehand, one new token at batch 1, on two
threads. The models take turns, step by step; a number is the median. Ends with 1 if a model takes more than 1.10 times
as long as the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from decode import TYPES

ALLOWED = 1.10
HEAD_DIM = 64  # of SmolLM2, where a model leaves it open
STEPS_BEFORE = 3  # not counted: the arena grows


class Runner:
    """A model bound to its buffers."""

    def __init__(self, path: Path, *, context: int, capacity: int, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        file = path / "model.onnx" if path.is_dir() else path
        self.session = ort.InferenceSession(str(file), options, ["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        self.values = {given.name: _value(given, context, capacity) for given in self.session.get_inputs()}
        for name, value in self.values.items():
            self.binding.bind_ortvalue_input(name, value)
        for output in self.session.get_outputs():
            past = output.name.replace("present", "past_key_values")
            if past in self.values:
                self.binding.bind_ortvalue_output(output.name, self.values[past])
            else:
                self.binding.bind_output(output.name)

    def seconds(self) -> float:
        """Run one step and return how long it took."""
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        return time.perf_counter() - start


def _value(declared: ort.NodeArg, context: int, capacity: int) -> ort.OrtValue:
    """Return the value of an input at a step that ends at `context` tokens."""
    dtype, generator = TYPES[declared.type], np.random.default_rng(0)
    if declared.name.startswith("past_key_values."):
        width = declared.shape[3] if isinstance(declared.shape[3], int) else HEAD_DIM
        array = generator.normal(size=[1, declared.shape[1], capacity, width])
    elif "mask" in declared.name:
        array = np.zeros((1, capacity if declared.shape[1] in ("max_length", capacity) else context))
        array[:, :context] = 1
    elif declared.name == "past_sequence_length" or "position" in declared.name:
        array = np.full([1] * len(declared.shape), context - 1)
    else:
        array = generator.integers(5, 1000, [1] * len(declared.shape))
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, dtype))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--capacity", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    runners = {
        str(path): Runner(path, context=options.context, capacity=options.capacity, threads=options.threads)
        for path in options.models
    }
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for round_ in range(STEPS_BEFORE + options.steps):
        for name, runner in runners.items():
            seconds = runner.seconds()
            if round_ >= STEPS_BEFORE:
                taken[name].append(seconds)
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    base = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"{median * 1e3:8.2f} ms  {median / base:5.2f}  (least {min(taken[name]) * 1e3:.2f} ms)  {name}")
    if options.json:
        options.json.write_text(json.dumps({"medians": medians, "seconds": taken}, indent=1), "utf-8")
    return int(max(medians.values()) > ALLOWED * base)


if __name__ == "__main__":
    sys.exit(main())
