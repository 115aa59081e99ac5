"""Times one decode step: injected, without a cache, and exported with its past by the exporter.

    python benchmarks/decode.py INJECTED [--without MODEL] [--exporter MODEL] [--json OUT]

A step is `run_with_ort_values` on values made beforehand, one new token at batch 1, the same for all. The models take
turns, one step each, and whose turn is first goes round. All is done twice, the sessions opened in one order and then
in the other: the address of a session's memory changes its times by some percent. Without a cache, the step is a
call on the whole context.
Also lists nodes of INJECTED whose output grows with the square of the context; there should be none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}
SHORT, LONG = 257, 514  # contexts between which a linear output doubles and a quadratic one quadruples
QUADRATIC = 3.0  # growth between the two from which an output counts as quadratic
STEPS_BEFORE = 2  # not counted: the arena grows

Values = dict[str, ort.OrtValue]


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A node whose output grows faster than the context does."""

    operator: str
    output: str
    short: tuple[int, ...]
    long: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Runner:
    """A model that can be asked for one step at any context."""

    name: str
    session: ort.InferenceSession

    @property
    def cached(self) -> bool:
        return any(i.name.startswith("past_key_values.") for i in self.session.get_inputs())

    def feeds(self, context: int) -> Values:
        """Return what a step that ends at `context` tokens is given."""
        new = 1 if self.cached else context
        return {i.name: _value(i, new, context) for i in self.session.get_inputs()}

    def seconds(self, feeds: Values) -> float:
        """Run one step and return how long it took."""
        names = [output.name for output in self.session.get_outputs()]
        start = time.perf_counter()
        self.session.run_with_ort_values(names, feeds)
        return time.perf_counter() - start


def _value(declared: ort.NodeArg, new: int, context: int) -> ort.OrtValue:
    sizes = {"batch_size": 1, "sequence_length": new, "past_sequence_length": context - new}
    shape = [sizes.get(dim, context) if isinstance(dim, str) else dim for dim in declared.shape]
    generator = np.random.default_rng(0)
    if declared.name.startswith("past_key_values."):
        array = generator.normal(size=shape)
    elif "mask" in declared.name:
        array = np.ones(shape)
    elif "position" in declared.name:
        array = np.broadcast_to(np.arange(context - new, context, dtype=np.float64), shape)
    else:
        array = generator.integers(5, 50, shape).astype(np.float64)
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, TYPES[declared.type]))


def open_runner(name: str, model: Path, threads: int) -> Runner:
    """Return a runner on a model file, or on `model.onnx` of a folder."""
    session = ort.InferenceSession(str(_file(model)), _options(threads), ["CPUExecutionProvider"])
    return Runner(name=name, session=session)


def _file(model: Path) -> Path:
    return model / "model.onnx" if model.is_dir() else model


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return options


def time_steps(runners: Sequence[Runner], context: int, steps: int, slow_steps: int) -> dict[str, list[float]]:
    """Return each model's seconds per step at a context; those without a cache take part in fewer rounds."""
    feeds = {runner.name: runner.feeds(context) for runner in runners}
    taken: dict[str, list[float]] = {runner.name: [] for runner in runners}
    slow_rounds = {STEPS_BEFORE + index * steps // slow_steps for index in range(slow_steps)}
    for round_ in range(STEPS_BEFORE + steps):
        first = round_ % len(runners)
        for runner in [*runners[first:], *runners[:first]]:
            if not runner.cached and round_ not in slow_rounds:
                continue
            seconds = runner.seconds(feeds[runner.name])
            if round_ >= STEPS_BEFORE:
                taken[runner.name].append(seconds)
    return taken


def measure(models: dict[str, Path], options: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Return the median seconds per step, by context and model."""
    taken: dict[int, dict[str, list[float]]] = {context: {name: [] for name in models} for context in options.contexts}
    for names in (list(models), list(reversed(models))):
        runners = [open_runner(name, models[name], options.threads) for name in names]
        for context in options.contexts:
            for name, seconds in time_steps(runners, context, options.steps, options.slow_steps).items():
                taken[context][name].extend(seconds)
        del runners
    return {context: {name: statistics.median(row[name]) for name in models} for context, row in taken.items()}


def quadratic_outputs(model: Path) -> list[Growth]:
    """Return the nodes whose output has more than linearly more elements when the context doubles.

    Every node's output becomes an output of the graph, which runs unoptimized at two contexts: the shapes are those
    that really come about, and a flattened or transposed T x T shows as well as a plain one.
    """
    file = _file(model)
    graph_model = onnx.load(file, load_external_data=False)
    makers = {output: node.op_type for node in graph_model.graph.node for output in node.output if output}
    known = {output.name for output in graph_model.graph.output}
    graph_model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in makers if name not in known)
    options = _options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent.resolve()))
    session = ort.InferenceSession(graph_model.SerializeToString(), options, ["CPUExecutionProvider"])
    runner = Runner(name="all outputs", session=session)
    names = list(makers)
    shapes = [_shapes(session, names, runner.feeds(context)) for context in (SHORT, LONG)]
    return [
        Growth(operator=makers[name], output=name, short=short, long=long)
        for name, short, long in zip(names, *shapes, strict=True)
        if np.prod(long) >= QUADRATIC * np.prod(short) and np.prod(long) > LONG
    ]


def _shapes(session: ort.InferenceSession, names: list[str], feeds: Values) -> list[tuple[int, ...]]:
    return [tuple(value.shape()) for value in session.run_with_ort_values(names, feeds)]


def print_steps(medians: dict[int, dict[str, float]]) -> None:
    """Print milliseconds per step, and the ratios that matter."""
    names = list(next(iter(medians.values())))
    others = [name for name in names if name != "injected"]
    print(f"{'context':>8}", *(f"{name + ' ms':>13}" for name in names), *(f"{name + '/inj.':>13}" for name in others))
    for context, row in medians.items():
        ratios = [row[name] / row["injected"] for name in others]
        print(f"{context:8}", *(f"{1000 * row[n]:13.2f}" for n in names), *(f"{ratio:13.2f}" for ratio in ratios))


def growth_of(medians: dict[int, dict[str, float]]) -> dict[str, float]:
    """Return the time per step at the longest context over that at the shortest, for each model."""
    first, last = medians[min(medians)], medians[max(medians)]
    return {name: last[name] / first[name] for name in first}


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("injected", type=Path, metavar="INJECTED", help="an .onnx file, or a folder with model.onnx")
    parser.add_argument("--without", type=Path, metavar="MODEL", help="the original, without a cache")
    parser.add_argument("--exporter", type=Path, metavar="MODEL", help="the same model, exported with its past")
    parser.add_argument("--contexts", nargs="+", type=int, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--steps", type=int, default=20, help="per context, model and order")
    parser.add_argument("--slow-steps", type=int, default=3, help="of these, how many without a cache")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="OUT")
    return parser.parse_args()


def main() -> int:
    """Measure, print and write."""
    options = parse()
    models = {"injected": options.injected, "without": options.without, "exporter": options.exporter}
    named = {name: model for name, model in models.items() if model}
    medians = measure(named, options)
    print_steps(medians)
    growth = growth_of(medians)
    print(f"from {min(medians)} to {max(medians)}: " + ", ".join(f"{n} x {ratio:.2f}" for n, ratio in growth.items()))
    if "exporter" in growth:
        print(f"growth of injected over the exporter's: {growth['injected'] / growth['exporter']:.3f}")
    quadratic = quadratic_outputs(options.injected)
    print(f"nodes of injected whose output grows with the square of the context: {len(quadratic)}")
    for found in quadratic[:20]:
        print(f"  {found.operator} `{found.output}` {found.short} -> {found.long}")
    if options.json:
        facts = {"seconds": medians, "growth": growth, "quadratic": [vars(found) for found in quadratic]}
        options.json.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return 1 if quadratic else 0


if __name__ == "__main__":
    sys.exit(main())
