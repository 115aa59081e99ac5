"""Measure what changing KV heads costs: peak memory, bytes written, and throughput compared with `cp`.

    python benchmarks/weights.py [--layers 32] [--pipeline PASSES...] [--work DIR] [--json OUT]

The decoder has the shape of Llama 3.1 8B. Its data file has its true size and is one hole, but for the projections of
keys and values, which are really there: these are what a pass over heads reads. As many bytes are then copied by `cp`,
cold and in the same run, with and without waiting until they are on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from sizes.page_cache import forget
from sizes.workloads import SHAPES, write_sparse

import kvsurgeon
from kvsurgeon.io import load, weight_files

HERE = Path(__file__).parent
MEGA = 1e6
PEAK = 400 * MEGA  # bytes in addition to the largest tensor
SLOWEST = 0.5  # of cp's throughput
CHANGE = """
import json, sys, time
from kvsurgeon.io import save
from kvsurgeon.workflow.pipeline import Pipeline
start = time.perf_counter()
result = Pipeline.parse(sys.argv[3]).run(sys.argv[1])
changed = time.perf_counter()
save(result.model, sys.argv[2])
print(json.dumps({"pass_seconds": changed - start, "save_seconds": time.perf_counter() - changed}))
"""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Measurements of one change of heads."""

    layers: int
    pipeline: str
    data_bytes: int  # of the original's data file, holes included
    changed_bytes: int  # of the tensors that are new
    largest_bytes: int  # of one of them
    written_bytes: int
    peak_bytes: int
    pass_seconds: float
    save_seconds: float
    copy_seconds: float  # by `cp`
    copy_and_sync_seconds: float  # by `cp`, and until it is on the disk, as a saved model is

    @property
    def over(self) -> list[str]:
        """Limits that are exceeded."""
        found = []
        if self.peak_bytes > PEAK + self.largest_bytes:
            found.append(f"{PEAK / MEGA:.0f} MB + the largest tensor")
        if abs(self.written_bytes - self.changed_bytes) > self.changed_bytes / 100:
            found.append("1 % of the changed tensors' bytes")
        if self.save_seconds > self.copy_seconds / SLOWEST:
            found.append("twice the time of cp")
        return found


def write_model(folder: Path, layers: int) -> Path:
    """Write a sparse decoder in whose data file the projections of keys and values are really there."""
    path = write_sparse(folder, SHAPES[layers], "dynamo")
    projections = [p for a in kvsurgeon.inspect(path).attentions for p in (a.key, a.value) if p is not None]
    names = {name for projection in projections for name in projection.initializers}
    initializers = load(path).graph.initializers
    noise = np.random.default_rng(0)
    with path.with_name("model.onnx.data").open("r+b") as file:
        for name in names:
            tensor = initializers[name].const_value  # the sizes of views are constants too
            if isinstance(tensor, ir.ExternalTensor):
                file.seek(tensor.offset or 0)
                file.write(noise.standard_normal(tensor.size, np.float32).astype(np.float16).tobytes())
        os.fsync(file.fileno())
    return path


def measure(path: Path, pipeline: str, layers: int) -> Measurement:
    """Change the heads of a model in a separate process, then copy as many bytes."""
    output = path.parent.parent / "output"
    forget(path.with_name("model.onnx.data"))
    run = _run([sys.executable, "-c", CHANGE, str(path), str(output), pipeline])
    inside = json.loads(run["said"].splitlines()[-1])
    changed = load(output).graph.initializers.values()
    fresh = output / "model.onnx-2.data"
    sizes = [
        value.const_value.nbytes
        for value in changed
        if value.const_value is not None and str(getattr(value.const_value, "location", "")) == fresh.name
    ]
    assert fresh in {file.path for file in weight_files(load(output))}, "nothing was written"
    copies = [_copy(fresh, fresh.with_name("copy"), synced) for synced in (False, True)]
    return Measurement(
        layers=layers,
        pipeline=pipeline,
        data_bytes=path.with_name("model.onnx.data").stat().st_size,
        changed_bytes=sum(sizes),
        largest_bytes=max(sizes),
        written_bytes=fresh.stat().st_size,
        peak_bytes=run["peak_bytes"],
        copy_seconds=copies[0],
        copy_and_sync_seconds=copies[1],
        **inside,
    )


def _run(command: list[str]) -> dict:
    launcher = [sys.executable, "-I", "-S", str(HERE / "sizes" / "measured.py")]
    answer = subprocess.run([*launcher, *command], capture_output=True, text=True, check=True)
    result: dict = json.loads(answer.stdout)
    if result["exit_code"]:
        raise SystemExit(result["said"])
    return result


def _copy(source: Path, target: Path, synced: bool) -> float:
    subprocess.run(["sync", str(source)], check=True)  # what is not on the disk yet cannot be forgotten
    forget(source)
    start = time.perf_counter()
    subprocess.run(["cp", str(source), str(target)], check=True)
    if synced:
        subprocess.run(["sync", str(target)], check=True)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, choices=sorted(SHAPES))
    parser.add_argument("--pipeline", nargs="+", default=["replicate-kv-heads{repeat=2}", "expand-gqa"])
    parser.add_argument("--work", type=Path, help="folder on a file system that has sparse files")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    found = []
    for pipeline in options.pipeline:
        with tempfile.TemporaryDirectory(dir=options.work, prefix="weights-") as folder:
            path = write_model(Path(folder) / "model", options.layers)
            found.append(measure(path, pipeline, options.layers))
        print_one(found[-1])
    if options.json:
        facts = [{**asdict(one), "over": one.over} for one in found]
        options.json.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return 1 if any(one.over for one in found) else 0


def print_one(m: Measurement) -> None:
    """Print what one change took."""
    print(f"{m.pipeline} on {m.layers} layers, a data file of {m.data_bytes / 1e9:.1f} GB")
    print(f"  written     {m.written_bytes / MEGA:9.1f} MB, changed tensors {m.changed_bytes / MEGA:.1f} MB")
    print(f"  peak memory {m.peak_bytes / MEGA:9.1f} MB, largest tensor {m.largest_bytes / MEGA:.1f} MB")
    print(f"  pass        {m.pass_seconds:9.2f} s")
    seconds = (m.save_seconds, m.copy_seconds, m.copy_and_sync_seconds)
    save, copy, synced = (f"{m.written_bytes / MEGA / one:.0f} MB/s" for one in seconds)
    print(f"  save        {m.save_seconds:9.2f} s, {save}; cp {copy}, cp and sync {synced}")
    for what in m.over:
        print(f"  over: {what}")


if __name__ == "__main__":
    sys.exit(main())
