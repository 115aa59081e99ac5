"""Times one decode step of an encoder-decoder model with cross-attention inside, separate, and in the first call.

    python benchmarks/cross_attention.py DECODER [--encoder-length 1500] [--past 64] [--steps 20] [--json OUT]

Each form is injected into a copy of the decoder, an export without a cache. One new token at batch 1, on two threads.
The forms take turns, step by step; a number is the shortest step, and the processor time of all. Ends with 1 if
`separate` takes more than 0.8 times as long as `inside`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from decode import TYPES

import kvsurgeon

FORMS = ("inside", "separate", "first-call")
ALLOWED = 0.8
STEPS_BEFORE = 3  # not counted: the arena grows


class Runner:
    """A decoder with the inputs of one step."""

    def __init__(self, path: Path, *, lengths: dict[str, int], threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self.session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.values = {given.name: _value(given, lengths) for given in self.session.get_inputs()}
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []

    def step(self) -> None:
        """Run one step and record how long it took."""
        wall, processor = time.perf_counter(), time.process_time()
        self.session.run_with_ort_values(self.outputs, self.values)
        self.seconds.append(time.perf_counter() - wall)
        self.processor_seconds.append(time.process_time() - processor)

    def report(self) -> dict[str, float]:
        """Return milliseconds, without the first steps."""
        wall, processor = self.seconds[STEPS_BEFORE:], self.processor_seconds[STEPS_BEFORE:]
        return {
            "least": 1000 * min(wall),
            "median": 1000 * statistics.median(wall),
            "processor": 1000 * statistics.median(processor),
        }


def _value(declared: ort.NodeArg, lengths: dict[str, int]) -> ort.OrtValue:
    """Return the value of an input at a step."""
    dtype, random = TYPES[declared.type], np.random.default_rng(0)
    shape = [dim if isinstance(dim, int) else lengths[dim] for dim in declared.shape]
    array = random.standard_normal(shape) if np.issubdtype(dtype, np.floating) else np.ones(shape)
    return ort.OrtValue.ortvalue_from_numpy(array.astype(dtype))


def main() -> int:
    """Compare the forms, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("decoder", type=Path)
    parser.add_argument("--encoder-length", type=int, default=1500, help="if the decoder takes any")
    parser.add_argument("--past", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    encoder = dict.fromkeys(("encoder_sequence_length", "past_encoder_sequence_length"), options.encoder_length)
    lengths = {"batch_size": 1, "sequence_length": 1, "past_sequence_length": options.past, **encoder}
    with tempfile.TemporaryDirectory() as scratch:
        runners = {}
        for form in FORMS:
            path = Path(scratch) / form / "decoder.onnx"
            kvsurgeon.inject(options.decoder, path, verify=False, cross_attention=form)
            runners[form] = Runner(path, lengths=lengths, threads=options.threads)
        for _ in range(STEPS_BEFORE + options.steps):
            for runner in runners.values():
                runner.step()
    reports = {form: runner.report() for form, runner in runners.items()}
    for form, report in reports.items():
        ratios = {what: number / reports["inside"][what] for what, number in report.items()}
        print(f"{form:12}" + "".join(f"  {what} {report[what]:8.2f} ms ({ratios[what]:.3f})" for what in report))
    if options.json:
        options.json.write_text(json.dumps(reports, indent=2))
    return int(reports["separate"]["least"] > ALLOWED * reports["inside"]["least"])


if __name__ == "__main__":
    sys.exit(main())
