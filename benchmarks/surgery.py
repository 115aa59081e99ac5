"""Measures surgery on graphs of any size: whole-process time, peak memory, bytes read of the weights.

    python benchmarks/surgery.py [MODEL...] [--layers 2 32 80 126] [--repeat 5] [--json OUT]

The decoders are written on the spot as PyTorch's two exporters would write them (`workloads.py`), the largest with the
shape of Llama 3.1 405B, each with a data file of its true size that is one hole: nothing is there to be read, but
whatever is read shows in the page cache (`page_cache.py`). MODELs are measured in the same way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import onnx
from sizes.page_cache import bytes_cached, check_gauge, forget
from sizes.workloads import SHAPES, DecoderShape, Dialect, write_sparse

HERE = Path(__file__).parent
MEGA = 1e6
THROUGH_PYTHON = """
import sys, onnx
from pathlib import Path
from kvsurgeon import KeyValueCacheInjector
model, output = map(Path, sys.argv[1:])
KeyValueCacheInjector(model.parent).export(onnx.load(model, load_external_data=False), output / "model.onnx")
"""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Limits of a size and dialect."""

    seconds: float
    megabytes: float = 700.0


LIMITS = {("dynamo", 126): Limit(seconds=10), ("torchscript", 126): Limit(seconds=30)}
GROWTH_LIMIT = 1.5  # time per layer at 126 layers over that at 32
RATIO_LIMIT = 6.0
FEW_NODES = 2000  # below, fixed costs are most of the pass, and the ratio says little


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Measurements of one model."""

    name: str
    dialect: str
    layers: int | None
    nodes: int
    graph_bytes: int
    data_bytes: int
    seconds: float = float("nan")  # of the whole process, by the clock: the median
    cpu_seconds: float = float("nan")  # of the processor: distinguishes a busy machine from a slow pass
    peak_megabytes: float = float("nan")
    weight_bytes_read: int = -1  # found in the page cache afterwards
    asked_bytes: int = -1  # by read calls, of anything: libraries, the graph, weights
    pass_seconds: float = float("nan")
    load_and_save_seconds: float = float("nan")
    failure: str = ""

    @property
    def ratio(self) -> float:
        return self.pass_seconds / self.load_and_save_seconds

    @property
    def milliseconds_per_layer(self) -> float:
        return 1000 * self.seconds / self.layers if self.layers else float("nan")


def measure(path: Path, *, name: str, dialect: str, layers: int | None, options: argparse.Namespace) -> Measurement:
    """Inject a model several times, in a process each, and once more inside a process to time the pass alone."""
    data = sorted(path.parent.glob("*.data"))
    blank = Measurement(
        name=name,
        dialect=dialect,
        layers=layers,
        nodes=len(onnx.load(path, load_external_data=False).graph.node),
        graph_bytes=path.stat().st_size,
        data_bytes=sum(file.stat().st_size for file in data),
    )
    for file in data:
        forget(file)
    runs = [_whole_process(path, options) for _ in range(options.repeat)]
    read = sum(bytes_cached(file) for file in data)
    if failed := next((run for run in runs if run["exit_code"]), None):
        return replace(blank, failure=f"exit {failed['exit_code']}: {' '.join(failed['said'].split())[-300:]}")
    whole = replace(
        blank,
        seconds=statistics.median(run["seconds"] for run in runs),
        cpu_seconds=statistics.median(run["cpu_seconds"] for run in runs),
        peak_megabytes=max(run["peak_bytes"] for run in runs) / MEGA,
        weight_bytes_read=read,
        asked_bytes=max(run["asked_bytes"] for run in runs),
    )
    alone = _run([sys.executable, str(HERE / "sizes" / "pass_alone.py"), str(path), "--repeat", str(options.repeat)])
    if alone["exit_code"]:
        return replace(whole, failure=f"pass alone: {alone['said'].splitlines()[-1:]}")
    inside = json.loads(alone["said"].splitlines()[-1])
    return replace(whole, pass_seconds=inside["pass_seconds"], load_and_save_seconds=inside["load_and_save_seconds"])


def _whole_process(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=path.parent.parent, prefix="injected-") as output:
        command = [str(Path(sys.executable).with_name("kvsurgeon")), "inject", str(path), "-o", output, "--no-verify"]
        if options.through == "python":
            command = [sys.executable, "-c", THROUGH_PYTHON, str(path), output]
        return _run(command)


def _run(command: Sequence[str]) -> dict[str, Any]:
    launcher = [sys.executable, "-I", "-S", str(HERE / "sizes" / "measured.py")]
    answer = subprocess.run([*launcher, *command], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(answer.stdout)
    return result


def synthetic(options: argparse.Namespace, work: Path) -> Iterator[Measurement]:
    """Write, measure and delete each synthetic decoder."""
    for dialect in options.dialect:
        for layers in options.layers:
            shape: DecoderShape = SHAPES[layers]
            path = write_sparse(work / f"{dialect}-{layers}", shape, dialect, dtype=options.dtype)
            yield measure(path, name=f"{dialect} {layers}", dialect=dialect, layers=layers, options=options)
            for file in path.parent.iterdir():
                file.unlink()


def print_table(measurements: Sequence[Measurement]) -> None:
    """Print a row for each model, and an `over` where a limit is exceeded."""
    head = [
        "model",
        "nodes",
        "graph MB",
        "data GB",
        "seconds",
        "cpu s",
        "ms/layer",
        "peak MB",
        "read",
        "pass s",
        "ratio",
    ]
    width = max(len("model"), *(len(m.name) for m in measurements))
    print(f"{head[0]:{width}}", *(f"{column:>9}" for column in head[1:]))
    for m in measurements:
        cells = [m.nodes, f"{m.graph_bytes / MEGA:.1f}", f"{m.data_bytes / 1e9:.1f}", f"{m.seconds:.2f}"]
        cells += [
            f"{m.cpu_seconds:.2f}",
            f"{m.milliseconds_per_layer:.1f}",
            f"{m.peak_megabytes:.0f}",
            m.weight_bytes_read,
        ]
        cells += [f"{m.pass_seconds:.2f}", f"{m.ratio:.2f}"]
        print(f"{m.name:{width}}", *(f"{cell!s:>9}" for cell in cells), *(f" over: {what}" for what in exceeded(m)))
        if m.failure:
            print(f"{'':{width}}  {m.failure}")


def exceeded(m: Measurement) -> list[str]:
    """Return which limits a measurement is over."""
    limit = LIMITS.get((m.dialect, m.layers or 0))
    over = [f"ratio {RATIO_LIMIT:g}"] if m.ratio > RATIO_LIMIT and m.nodes >= FEW_NODES else []
    if m.weight_bytes_read > 0:
        over.append("0 bytes read")
    if limit and m.seconds > limit.seconds:
        over.append(f"{limit.seconds:g} s")
    if limit and m.peak_megabytes > limit.megabytes:
        over.append(f"{limit.megabytes:g} MB")
    return over


def print_growth(measurements: Sequence[Measurement]) -> None:
    """Print how the time per layer grows: 1.0 where surgery is linear in the layers."""
    by_size = {(m.dialect, m.layers): m for m in measurements if not m.failure}
    for dialect in get_args(Dialect):
        small, large = by_size.get((dialect, 32)), by_size.get((dialect, 126))
        if small and large:
            whole = large.milliseconds_per_layer / small.milliseconds_per_layer
            alone = (large.pass_seconds / 126) / (small.pass_seconds / 32)
            said = f"{whole:.2f} whole process, {alone:.2f} pass alone"
            over = f" over: {GROWTH_LIMIT:g}" if max(whole, alone) > GROWTH_LIMIT else ""
            print(f"{dialect}: time per layer at 126 layers over 32: {said}{over}")


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="an .onnx file to measure as well")
    parser.add_argument("--layers", nargs="*", type=int, default=[2, 32, 80, 126], choices=sorted(SHAPES))
    parser.add_argument("--dialect", nargs="+", default=list(get_args(Dialect)), choices=get_args(Dialect))
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=5, help="processes per model; the median counts")
    parser.add_argument("--through", default="command", choices=["command", "python"])
    parser.add_argument("--work", type=Path, help="folder on a file system that has sparse files")
    parser.add_argument("--json", type=Path, metavar="OUT")
    return parser.parse_args()


def main() -> int:
    """Measure, print and write."""
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.work, prefix="surgery-") as folder:
        work = Path(folder)
        check_gauge(write_sparse(work / "gauge", SHAPES[2], "dynamo").with_name("model.onnx.data"))
        measurements = list(synthetic(options, work))
        for path in options.models:
            name = f"{path.parent.name}/{path.name}"
            measurements.append(measure(path.resolve(), name=name, dialect="", layers=None, options=options))
    print_table(measurements)
    print_growth(measurements)
    if options.json:
        facts = [{**asdict(m), "ratio": m.ratio, "over": exceeded(m)} for m in measurements]
        options.json.write_text(json.dumps(facts, indent=1).replace("NaN", "null"), encoding="utf-8")
    return 1 if any(m.failure for m in measurements) else 0


if __name__ == "__main__":
    sys.exit(main())
