"""Times one decode step in place: past and present of each entry bound to one buffer with capacity for more tokens.

    python -m onnxruntime_genai.models.builder -m hf -i HUGGING_FACE_FOLDER -o built -p fp32 -e cpu -c CACHE
    kvsurgeon inject smollm2 --target genai-shared-buffer -o folder
    python benchmarks/shared_buffer.py built folder [--context 16 256 1024] [--capacity 2048] [--steps 20] [--json OUT]

In 4 bits, with the output projection and the embedding quantized too: the builder with `-p int4 --extra_options
int4_accuracy_level=4 int4_block_size=32`, and a model after `raise-opset{opset=21},store-transposed-weights` with

    python -m onnxruntime.quantization.matmul_nbits_quantizer --input_model folder/model.onnx --output_model \\
        quantized/model.onnx --block_size 32 --accuracy_level 4 --symmetric True \\
        --op_types_to_quantize MatMul Gather --quant_axes MatMul:0 Gather:1

Every model is run the same way: through an `IOBinding` on values made beforehand, one new token at batch 1, on two
threads. The models take turns, step by step; printed are the median and the least time, each also as a ratio to those
of the first model, and the nodes of the optimized graph. Other processes disturb medians more than minima; with
`--threads 1` what is taken is the processor time of the thread, which they hardly disturb. Ends with 1 if the median of
a model is more than 1.10 times that of the first. Buffers of integers hold random ones (`quantize-cache` with constant
scales).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime as ort
from decode import TYPES

ALLOWED = 1.10
HEAD_DIM = 64  # of SmolLM2, where a model leaves it open
STEPS_BEFORE = 3  # not counted: the arena grows


class Runner:
    """A model bound to its buffers.

    Attributes:
        nodes: Number of nodes of the graph that onnxruntime runs.
        megabytes: Size of its buffers.
    """

    def __init__(self, path: Path, *, capacity: int, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # not in the turn of another model
        file = path / "model.onnx" if path.is_dir() else path
        with TemporaryDirectory() as scratch:
            options.optimized_model_filepath = str(Path(scratch) / "model.onnx")
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "data")
            self.session = ort.InferenceSession(str(file), options, ["CPUExecutionProvider"])
            self.nodes = len(onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node)
        self.capacity = capacity
        self.clock = time.thread_time if threads == 1 else time.perf_counter

    def bind(self, context: int) -> None:
        """Bind values for a step that ends at `context` tokens."""
        self.binding = self.session.io_binding()
        self.values = {given.name: _value(given, context, self.capacity) for given in self.session.get_inputs()}
        pasts = [value for name, value in self.values.items() if name.startswith("past_key_values.")]
        self.megabytes = sum(value.numpy().nbytes for value in pasts) / 1e6
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
        start = self.clock()
        self.session.run_with_iobinding(self.binding)
        return self.clock() - start


def _value(declared: ort.NodeArg, context: int, capacity: int) -> ort.OrtValue:
    """Return the value of an input at a step that ends at `context` tokens."""
    dtype, generator = TYPES[declared.type], np.random.default_rng(0)
    if declared.name.startswith("past_key_values."):
        width = declared.shape[3] if isinstance(declared.shape[3], int) else HEAD_DIM
        array = generator.normal(size=[1, declared.shape[1], capacity, width])
        if np.issubdtype(dtype, np.integer):  # rows of a quantized cache
            array = array * 30 + np.iinfo(dtype).max // 2 * (dtype is np.uint8)
    elif "mask" in declared.name:
        array = np.zeros((1, capacity if declared.shape[1] in ("max_length", capacity) else context))
        array[:, :context] = 1
    elif declared.name == "past_sequence_length" or "position" in declared.name:
        array = np.full([1] * len(declared.shape), context - 1)
    else:
        array = generator.integers(5, 1000, [1] * len(declared.shape))
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, dtype))


def in_turns(runners: dict[str, Runner], steps: int) -> dict[str, list[float]]:
    """Return the times of each model, which take turns step by step."""
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for round_ in range(STEPS_BEFORE + steps):
        for name, runner in runners.items():
            seconds = runner.seconds()
            if round_ >= STEPS_BEFORE:
                taken[name].append(seconds)
    return taken


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--context", type=int, nargs="+", default=[16, 256, 1024])
    parser.add_argument("--capacity", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    runners = {str(path): Runner(path, capacity=options.capacity, threads=options.threads) for path in options.models}
    times: dict[int, dict[str, list[float]]] = {}
    slow = False
    for context in options.context:
        for runner in runners.values():
            runner.bind(context)
        taken = times[context] = in_turns(runners, options.steps)
        medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
        median, least = (compare(next(iter(taken.values()))) for compare in (statistics.median, min))
        for name, seconds in taken.items():
            print(
                f"{context:5} tokens  median {medians[name] * 1e3:7.2f} ms {medians[name] / median:5.2f}  "
                f"least {min(seconds) * 1e3:7.2f} ms {min(seconds) / least:5.2f}  {runners[name].nodes:4} nodes  "
                f"{runners[name].megabytes:5.0f} MB  {name}"
            )
        slow |= max(medians.values()) > ALLOWED * median
    if options.json:
        options.json.write_text(json.dumps(times, indent=1), "utf-8")
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
