"""Fix the shapes of models for prefill and for a decode step, and compile both files.

    python tests/clients/fixed_shapes.py                                   # the exports in tests/corpus
    python tests/clients/fixed_shapes.py MODEL [MODEL ...] [--context 1024] [--tokens 128]

Each model has two pairs of files: one with a static cache, fixed by `fix-shapes`, and that of the target `qnn`. Checked
is that no dimension is a symbol, that no operator computes a shape, and that both files read the same bytes of one data
file. OpenVINO then compiles each file in a separate environment, and its results are compared with those of
onnxruntime. Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from environments import CLIENTS, DEFAULT_PYTHON, HERE

import kvsurgeon
from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.shapes.fix_shapes import FixShapes
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

OWN = Path(__file__).parents[1] / "corpus"
SHAPE_OPERATORS = {"Shape", "Size", "Range", "ConstantOfShape", "NonZero", "EyeLike", "Trilu"}
SHAPE_INPUTS = {"Reshape": 1, "Expand": 1, "Tile": 1}  # index of the input that is a shape
ALLOWED = 1e-3  # of the spread of the results of onnxruntime
FILES = ("prefill.onnx", "decode.onnx")


def build_static(model: Path, folder: Path, tokens: int, context: int) -> None:
    """Write the pair with a static cache."""
    run_and_save(model, Pipeline((Inject(cache="static"),)), folder / "whole", verify=False, pack=True)
    for file, size in zip(FILES, (tokens, 1), strict=True):
        fixed = Pipeline((FixShapes(tokens=size, max_length=context),))
        run_and_save(folder / "whole", fixed, folder / "fixed" / file, verify=False)


def build_qnn(model: Path, folder: Path, tokens: int, context: int) -> None:
    """Write the pair of the target qnn, which returns new rows only."""
    kvsurgeon.inject(model, folder / "fixed", target="qnn", max_length=context, verify=False)


PAIRS: dict[str, Callable[[Path, Path, int, int], None]] = {"static": build_static, "qnn": build_qnn}


def problems_of(folder: Path) -> Iterator[str]:
    """Yield the problems of a pair."""
    graphs = {file: onnx.load(folder / file, load_external_data=False).graph for file in FILES}
    for file, graph in graphs.items():
        yield from (f"{file}: {problem}" for problem in _check_sizes(graph))
    places = [
        {one.name: sorted((entry.key, entry.value) for entry in one.external_data) for one in graph.initializer}
        for graph in graphs.values()
    ]
    weights = [{name: place for name, place in one.items() if place} for one in places]
    if weights[0] != weights[1] or not weights[0]:
        yield "the two files do not read the same bytes"
    data = {path.name for path in folder.iterdir() if path.suffix not in (".onnx", ".json", ".npz", ".txt", ".jinja")}
    if len(data) != 1:
        yield f"expected one data file, found {sorted(data)}"


def _check_sizes(graph: onnx.GraphProto) -> Iterator[str]:
    known = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output, *graph.value_info)}
    constants = {one.name for one in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    for name in [*known, *(name for node in graph.node for name in node.output if name)]:
        if name not in known or not all(size.HasField("dim_value") for size in known[name].shape.dim):
            yield f"`{name}` has no fixed shape"
    for node in graph.node:
        place = SHAPE_INPUTS.get(node.op_type)
        if node.op_type in SHAPE_OPERATORS or (place is not None and node.input[place] not in constants):
            yield f"{node.op_type} at `{node.output[0]}` computes a shape"


def compare_with_openvino(folder: Path, python: Path) -> float:
    """Return the largest difference between OpenVINO and onnxruntime, over the spread of the results.

    Raises:
        RuntimeError: OpenVINO cannot compile or run a file.
    """
    expected = {file: _run_in_onnxruntime(folder / file) for file in FILES}
    ran = subprocess.run([python, HERE / "openvino_fixed.py", folder], capture_output=True, text=True, errors="replace")
    if ran.returncode:
        raise RuntimeError(f"OpenVINO: {(ran.stderr.strip().splitlines() or ['it crashed'])[-1][:300]}")
    worst = 0.0
    for file, outputs in expected.items():
        with np.load((folder / file).with_suffix(".out.npz")) as found:
            for name, array in outputs.items():
                worst = max(worst, float(np.abs(found[name] - array).max() / max(np.ptp(array), 1e-9)))
    return worst


def _run_in_onnxruntime(file: Path) -> dict[str, np.ndarray]:
    """Run a file on tokens after a past, and save its inputs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
    random = np.random.default_rng(3)
    feeds = {given.name: _input(given, random) for given in session.get_inputs()}
    np.savez(file.with_suffix(".npz"), **feeds)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _input(given: onnxruntime.NodeArg, random: np.random.Generator) -> np.ndarray:
    """Return an input for texts with four tokens in the cache and no padding."""
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}
    dtype = types.get(given.type, np.int64)
    if given.name == "past_sequence_length":
        return np.full(given.shape, 4, dtype)
    if given.name == "input_ids":
        return random.integers(3, 40, given.shape).astype(dtype)
    if given.name == "position_ids":
        return (4 + np.arange(np.prod(given.shape)).reshape(given.shape)).astype(dtype)
    if given.name.startswith("position_ids_"):
        return np.cos(random.normal(size=given.shape)).astype(dtype)
    if given.name.startswith("attention_mask"):
        return np.zeros(given.shape, dtype) if given.type == "tensor(float)" else np.ones(given.shape, dtype)
    return random.normal(size=given.shape).astype(dtype)


def check(model: Path, pair: str, options: argparse.Namespace, python: Path) -> tuple[bool, str]:
    """Return whether a pair passes, with a message."""
    with tempfile.TemporaryDirectory(prefix="kvsurgeon-fixed-") as scratch:
        folder = Path(scratch)
        try:
            longest = kvsurgeon.inspect(model).max_length
            context = min(options.context, longest or options.context)
            tokens = max(1, min(options.tokens, context // 2))
            PAIRS[pair](model, folder, tokens, context)
            found = list(problems_of(folder / "fixed"))
            if found:
                return False, f"{found[0]} (and {len(found) - 1} more)"
            error = compare_with_openvino(folder / "fixed", python)
        except (KvsurgeonError, RuntimeError) as failure:
            return False, str(failure)
        data = next(path for path in (folder / "fixed").iterdir() if path.suffix == ".data")
        digest = hashlib.sha256(data.read_bytes()).hexdigest()[:12]
        message = f"{tokens} and 1 of {context} tokens, {data.stat().st_size:,} bytes {digest}, error {error:.1e}"
        return error <= ALLOWED, message


def main() -> int:
    """Check the models of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", help="models, or folders that hold one each")
    parser.add_argument("--context", type=int, default=1024, help="context length, unless the model supports less")
    parser.add_argument("--tokens", type=int, default=128, help="prefill length")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "kvsurgeon-clients")
    options = parser.parse_args()
    call, _ = CLIENTS["openvino"].command(options.environments.absolute(), DEFAULT_PYTHON)
    passed, pairs = 0, 0
    for model in options.models or sorted(OWN.glob("*.onnx")):
        for pair in PAIRS:
            passes, message = check(model, pair, options, Path(call[0]))
            passed, pairs = passed + passes, pairs + 1
            name = model.stem if model.suffix else "/".join(model.parts[-2:])
            print(f"{'ok' if passes else 'FAILED':6} {name:36} {pair:9} {message}", flush=True)
    print(f"fixed shapes: {passed} of {pairs} pairs passed")
    return int(passed < pairs)


if __name__ == "__main__":
    sys.exit(main())
