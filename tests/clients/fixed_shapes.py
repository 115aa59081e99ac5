"""Fix the shapes of models, once for a prompt and once for a step, and see whether a compiler takes both files.

    python tests/clients/fixed_shapes.py                                   # the exports in tests/corpus
    python tests/clients/fixed_shapes.py MODEL [MODEL ...] [--context 1024] [--tokens 128]

Two pairs of each model: one whose cache is written in place, fixed by `fix-shapes`, and that of the target `qnn`.
Looked at: no dimension is a symbol, no operator computes a shape, and both files read the same bytes of one data file.
Each file is then compiled by OpenVINO, in an environment of its own, and gives what it gives in onnxruntime. Ends with
1 if any of it is not so.
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
OF_SHAPES = {"Shape", "Size", "Range", "ConstantOfShape", "NonZero", "EyeLike", "Trilu"}
SHAPED_BY = {"Reshape": 1, "Expand": 1, "Tile": 1}  # the input that says a shape
ALLOWED = 1e-3  # of the spread of what onnxruntime gives
FILES = ("prefill.onnx", "decode.onnx")


def in_place(model: Path, folder: Path, tokens: int, context: int) -> None:
    """Write the pair whose cache is written in place."""
    run_and_save(model, Pipeline((Inject(cache="static"),)), folder / "whole", verify=False, pack=True)
    for file, size in zip(FILES, (tokens, 1), strict=True):
        fixed = Pipeline((FixShapes(tokens=size, max_length=context),))
        run_and_save(folder / "whole", fixed, folder / "fixed" / file, verify=False)


def of_qnn(model: Path, folder: Path, tokens: int, context: int) -> None:
    """Write the pair of which new rows come out."""
    kvsurgeon.inject(model, folder / "fixed", target="qnn", max_length=context, verify=False)


PAIRS: dict[str, Callable[[Path, Path, int, int], None]] = {"in place": in_place, "qnn": of_qnn}


def faults(folder: Path) -> Iterator[str]:
    """Yield what keeps a pair from being what a compiler wants."""
    graphs = {file: onnx.load(folder / file, load_external_data=False).graph for file in FILES}
    for file, graph in graphs.items():
        yield from (f"{file}: {fault}" for fault in _of_sizes(graph))
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


def _of_sizes(graph: onnx.GraphProto) -> Iterator[str]:
    known = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output, *graph.value_info)}
    constants = {one.name for one in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    for name in [*known, *(name for node in graph.node for name in node.output if name)]:
        if name not in known or not all(size.HasField("dim_value") for size in known[name].shape.dim):
            yield f"`{name}` has no size in numbers"
    for node in graph.node:
        place = SHAPED_BY.get(node.op_type)
        if node.op_type in OF_SHAPES or (place is not None and node.input[place] not in constants):
            yield f"{node.op_type} at `{node.output[0]}` computes a shape"


def compiled(folder: Path, python: Path) -> float:
    """Return how far OpenVINO is from onnxruntime on both files, as a part of the spread.

    Raises:
        RuntimeError: It does not take one of them.
    """
    expected = {file: _in_onnxruntime(folder / file) for file in FILES}
    ran = subprocess.run([python, HERE / "openvino_fixed.py", folder], capture_output=True, text=True, errors="replace")
    if ran.returncode:
        raise RuntimeError(f"OpenVINO: {(ran.stderr.strip().splitlines() or ['it crashed'])[-1][:300]}")
    worst = 0.0
    for file, outputs in expected.items():
        with np.load((folder / file).with_suffix(".out.npz")) as found:
            for name, array in outputs.items():
                worst = max(worst, float(np.abs(found[name] - array).max() / max(np.ptp(array), 1e-9)))
    return worst


def _in_onnxruntime(file: Path) -> dict[str, np.ndarray]:
    """Run a file on some tokens behind some others, and write down what it was given."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
    random = np.random.default_rng(3)
    feeds = {given.name: _some(given, random) for given in session.get_inputs()}
    np.savez(file.with_suffix(".npz"), **feeds)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _some(given: onnxruntime.NodeArg, random: np.random.Generator) -> np.ndarray:
    """What one input may be given: texts that fill four rows already, and see all that causality allows."""
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


def tried(model: Path, pair: str, options: argparse.Namespace, python: Path) -> tuple[bool, str]:
    """Return whether a pair is right, and what there is to say of it."""
    with tempfile.TemporaryDirectory(prefix="kvsurgeon-fixed-") as scratch:
        folder = Path(scratch)
        try:
            longest = kvsurgeon.inspect(model).max_length
            context = min(options.context, longest or options.context)
            tokens = max(1, min(options.tokens, context // 2))
            PAIRS[pair](model, folder, tokens, context)
            found = list(faults(folder / "fixed"))
            if found:
                return False, f"{found[0]} (and {len(found) - 1} more)"
            apart = compiled(folder / "fixed", python)
        except (KvsurgeonError, RuntimeError) as error:
            return False, str(error)
        data = next(path for path in (folder / "fixed").iterdir() if path.suffix == ".data")
        digest = hashlib.sha256(data.read_bytes()).hexdigest()[:12]
        said = f"{tokens} and 1 of {context} tokens, {data.stat().st_size:,} bytes {digest}, {apart:.1e} apart"
        return apart <= ALLOWED, said


def main() -> int:
    """Try what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", help="models, or folders that hold one each")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a text, if the model takes so many")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a call for the prompt")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "kvsurgeon-clients")
    options = parser.parse_args()
    call, _ = CLIENTS["openvino"].command(options.environments.absolute(), DEFAULT_PYTHON)
    right, pairs = 0, 0
    for model in options.models or sorted(OWN.glob("*.onnx")):
        for pair in PAIRS:
            good, said = tried(model, pair, options, Path(call[0]))
            right, pairs = right + good, pairs + 1
            name = model.stem if model.suffix else "/".join(model.parts[-2:])
            print(f"{'right' if good else 'WRONG':6} {name:36} {pair:9} {said}", flush=True)
    print(f"fixed shapes: {right} of {pairs} pairs are right")
    return int(right < pairs)


if __name__ == "__main__":
    sys.exit(main())
