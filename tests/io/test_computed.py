"""Computed weights are written in chunks to a new file, and other weights stay in theirs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from kvsurgeon.errors import UsageError
from kvsurgeon.io import load, save, weight_files
from kvsurgeon.io.atomic_write import remove_stale
from kvsurgeon.weights import ComputedTensor, TensorSlice

ROWS = np.repeat(np.arange(32), 2)
EXPECTED = {"changed": 64 * 64 * 4, "kept": 64 * 64 * 4}


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """A model with weights `changed` [32, 64], which passes double, and `kept` [64, 64], and one tied to `kept`."""
    folder = tmp_path / "source"
    folder.mkdir()
    weights = {
        "changed": np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32),
        "kept": np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "kept"], ["h"]),
        helper.make_node("Gemm", ["h", "changed"], ["k"], transB=1),
        helper.make_node("MatMul", ["x", "tied"], ["t"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None]) for name in ("k", "t")],
    )
    offset = 0
    with (folder / "model.data").open("wb") as file:
        for name, array in weights.items():
            graph.initializer.append(_external(name, array, offset))
            file.write(array.tobytes())
            offset += array.nbytes
    tied = _external("tied", weights["kept"], weights["changed"].nbytes)
    graph.initializer.append(tied)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def _external(name: str, array: np.ndarray, offset: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "model.data", "offset": offset, "length": array.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def doubled(path: Path) -> ir.Model:
    """Return the model whose rows of `changed` will each be there twice."""
    model = load(path)
    value = model.graph.initializers["changed"]
    assert value.const_value is not None
    value.const_value = ComputedTensor([[TensorSlice(tensor=value.const_value, indices=ROWS)]], axis=0, name="changed")
    value.shape = value.const_value.shape
    return model


def read(path: Path) -> dict[str, np.ndarray]:
    initializers = load(path).graph.initializers
    return {name: np.array(value.const_value.numpy()) for name, value in initializers.items() if value.const_value}


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_only_what_changed_is_written(decoder: Path, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    saved = save(doubled(decoder), tmp_path / "out", link_weights=True, progress=lambda *report: reports.append(report))
    out = tmp_path / "out"
    assert names(out) == {"model.onnx", "model.data", "model.onnx.data"}
    assert os.path.samefile(out / "model.data", decoder.with_name("model.data"))
    assert (out / "model.onnx.data").stat().st_size == EXPECTED["changed"]
    assert reports[-1] == ("model.onnx.data", EXPECTED["changed"], EXPECTED["changed"])
    before, after = read(decoder), read(saved)
    np.testing.assert_array_equal(after["changed"], before["changed"][ROWS])
    np.testing.assert_array_equal(after["kept"], before["kept"])


def test_computed_weights_never_take_the_name_of_linked_ones(decoder: Path, tmp_path: Path) -> None:
    decoder.with_name("model.data").rename(decoder.with_name("model.onnx.data"))
    proto = onnx.load(decoder, load_external_data=False)
    for tensor in proto.graph.initializer:
        tensor.external_data[0].value = "model.onnx.data"
    decoder.write_bytes(proto.SerializeToString())
    saved = save(doubled(decoder), tmp_path / "out")
    assert {file.location for file in weight_files(load(saved))} == {"model.onnx.data", "model.onnx-2.data"}
    assert read(saved)["changed"].shape == (64, 64)


def test_in_the_same_folder_the_old_data_stays(decoder: Path) -> None:
    before, old = read(decoder), decoder.with_name("model.data").read_bytes()
    old_model = decoder.read_bytes()
    save(doubled(decoder), decoder)
    assert decoder.with_name("model.data").read_bytes() == old
    np.testing.assert_array_equal(read(decoder)["changed"], before["changed"][ROWS])
    decoder.write_bytes(old_model)  # the old model still finds all that it refers to
    np.testing.assert_array_equal(read(decoder)["changed"], before["changed"])


def test_a_second_pass_reads_the_weights_of_the_first(decoder: Path, tmp_path: Path) -> None:
    model = doubled(decoder)
    value = model.graph.initializers["changed"]
    assert value.const_value is not None
    value.const_value = ComputedTensor(
        [[TensorSlice(tensor=value.const_value, indices=np.arange(5))]], axis=0, name="changed"
    )
    np.testing.assert_array_equal(read(save(model, tmp_path / "out"))["changed"], read(decoder)["changed"][ROWS][:5])


@pytest.mark.parametrize("place", ["elsewhere", "in place"])
def test_packed_weights_are_in_one_file_without_unused_bytes(decoder: Path, tmp_path: Path, place: str) -> None:
    before = read(decoder)
    saved = save(doubled(decoder), decoder if place == "in place" else tmp_path / "out", pack=True)
    (file,) = weight_files(load(saved))
    assert (file.location, file.bytes) == ("model.onnx.data", sum(EXPECTED.values()))  # tied weights once
    assert "model.data" not in names(tmp_path / "out") if place == "elsewhere" else True
    after = read(saved)
    np.testing.assert_array_equal(after["changed"], before["changed"][ROWS])
    np.testing.assert_array_equal(after["kept"], before["kept"])
    np.testing.assert_array_equal(after["tied"], before["kept"])
    onnx.checker.check_model(str(saved))


def test_embedded_weights_are_packed_too(proto: onnx.ModelProto, tmp_path: Path) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((32, 32), np.float32), "large"))
    saved = save(load(proto), tmp_path, pack=True)
    assert [file.bytes for file in weight_files(load(saved))] == [4096]


def test_embedded_weights_stay_in_the_model_file(decoder: Path, tmp_path: Path) -> None:
    proto = onnx.load(decoder)
    model = load(proto)
    value = model.graph.initializers["changed"]
    assert value.const_value is not None
    value.const_value = ComputedTensor([[TensorSlice(tensor=value.const_value, indices=ROWS)]], axis=0, name="changed")
    saved = save(model, tmp_path / "out")
    assert names(tmp_path / "out") == {"model.onnx"}
    np.testing.assert_array_equal(read(saved)["changed"], read(decoder)["changed"][ROWS])


def test_a_weight_that_cannot_be_computed_leaves_no_file(decoder: Path, tmp_path: Path) -> None:
    model = doubled(decoder)
    decoder.with_name("model.data").rename(decoder.with_name("gone"))
    with pytest.raises(UsageError, match="cannot write"):
        save(model, tmp_path / "out", pack=True)
    assert not (tmp_path / "out").exists()


SAVE = """
import resource, sys
import numpy as np
from pathlib import Path
from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.io import load, save
from kvsurgeon.io import atomic_write
from kvsurgeon.weights import ComputedTensor, TensorSlice
from kvsurgeon.weights import computed_tensor
source, out, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
computed_tensor.CHUNK = 256
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
model = load(source)
value = model.graph.initializers["changed"]
places = np.repeat(np.arange(32), 2)
value.const_value = ComputedTensor([[TensorSlice(tensor=value.const_value, indices=places)]], axis=0, name="changed")
print("ready", flush=True)
try:
    while True:
        save(model, out)
        print("saved", flush=True)
        if limit or out.name == "once":
            break
except KvsurgeonError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
@pytest.mark.parametrize("limit", [100, 5_000, 16_000])
@pytest.mark.parametrize("place", ["elsewhere", "in place"])
def test_a_full_disk_leaves_no_file(decoder: Path, tmp_path: Path, limit: int, place: str) -> None:
    before = {file.name: file.read_bytes() for file in decoder.parent.iterdir()}
    out = decoder.parent if place == "in place" else tmp_path / "out"
    command = [sys.executable, "-c", SAVE, str(decoder), str(out), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("cannot write `")
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert {file.name: file.read_bytes() for file in decoder.parent.iterdir()} == before
    assert place == "in place" or not out.exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_reported(decoder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="cannot write"):
        save(doubled(decoder), tmp_path / "out")
    assert not names(tmp_path / "out")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_killed_process_leaves_the_old_model_or_the_new_one(decoder: Path, tmp_path: Path) -> None:
    before, chance = read(decoder)["changed"], np.random.default_rng(0)
    found = set()
    for number in range(6):
        out = tmp_path / f"out-{number}"
        shutil.copytree(decoder.parent, out)
        command = [sys.executable, "-c", SAVE, str(decoder), str(out), "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(1 + number % 2):  # "ready", and every other time a first "saved"
                writer.stdout.readline()
            time.sleep(chance.uniform(0, 0.03))
            writer.send_signal(signal.SIGKILL)
        after = read(out / "model.onnx")["changed"]
        found.add(len(after))
        np.testing.assert_array_equal(after, before if len(after) == 32 else before[ROWS])
        remove_stale(out)  # as the next save would: a model is replaced in two steps, between which it may end
        assert not [name for name in names(out) if name.startswith(".")]
    assert 64 in found
