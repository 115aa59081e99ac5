"""Weights inside a large model file stay there: they are read when they are used, and streamed when it is saved."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoders import Config, Decoder
from onnx import TensorProto, helper, numpy_helper

import kvsurgeon
from kvsurgeon.errors import InvalidModelError, KvsurgeonError
from kvsurgeon.io import load, save, stored_weights, to_proto, wire_format
from kvsurgeon.io.stored_weights import stored_tensors


@pytest.fixture(autouse=True)
def _all_files_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_weights, "LARGE", 1)
    monkeypatch.setattr(wire_format, "_SMALLEST", 64)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    onnx.save(Decoder(Config()).model(), tmp_path / "model" / "model.onnx")
    return tmp_path / "model" / "model.onnx"


def test_an_unchanged_model_is_saved_byte_for_byte(file: Path, tmp_path: Path) -> None:
    model = load(file)
    assert len(stored_tensors(model)) > 10
    assert save(model, tmp_path / "out").read_bytes() == file.read_bytes()
    assert to_proto(model) == onnx.load(file)


def test_other_fields_and_types_are_kept(tmp_path: Path) -> None:
    tensors = [
        numpy_helper.from_array(np.arange(99, dtype=np.float16), "half"),
        numpy_helper.from_array(np.arange(99, dtype=np.int64), "integers"),
        numpy_helper.from_array(np.zeros((0, 4), np.float32), "empty"),
        helper.make_tensor("typed", TensorProto.FLOAT, [40], list(range(40))),
        TensorProto(name="packed", data_type=TensorProto.INT4, dims=[200], raw_data=bytes(range(100))),
        TensorProto(name="bfloat", data_type=TensorProto.BFLOAT16, dims=[50], raw_data=bytes(range(100))),
    ]
    tensors[0].doc_string = "described"
    tensors[1].metadata_props.add(key="a", value="b")
    nodes = [helper.make_node("Identity", [one.name], [f"{one.name}_out"]) for one in tensors]
    outputs = [helper.make_tensor_value_info(f"{one.name}_out", one.data_type, list(one.dims)) for one in tensors]
    graph = helper.make_graph(nodes, "g", [], outputs, tensors, doc_string="graph")
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    model = load(path)
    assert set(stored_tensors(model)) == {"half", "integers", "bfloat"}
    assert save(model, tmp_path / "out").read_bytes() == path.read_bytes()
    for one in tensors[:2]:
        np.testing.assert_array_equal(stored_tensors(model)[one.name].numpy(), numpy_helper.to_array(one))


def test_a_model_can_be_saved_over_its_own_file_twice(file: Path) -> None:
    original, model = onnx.load(file), load(file)
    for text in ("first", "second"):
        model.doc_string = text
        save(model, file)
        original.doc_string = text
        assert onnx.load(file) == original


def test_they_are_packed_into_a_data_file(file: Path, tmp_path: Path) -> None:
    saved = save(load(file), tmp_path / "out", pack=True)
    assert saved.stat().st_size < file.stat().st_size
    packed, embedded = (onnx.load(path).graph.initializer for path in (saved, file))
    for one, other in zip(packed, embedded, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))


def test_a_verification_refers_to_the_file(file: Path, tmp_path: Path) -> None:
    proto = to_proto(load(file), file.parent)
    entries = [entry for one in proto.graph.initializer for entry in one.external_data]
    locations = {entry.value for entry in entries if entry.key == "location"}
    assert locations == {"model.onnx"}
    run = kvsurgeon.inject(file, tmp_path / "out")
    assert run.verification is not None
    assert run.verification.verdict == "same"
    stored = onnx.load(file).graph.initializer
    after = {one.name: one for one in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}
    assert [one for one in stored if one.name in after and one != after[one.name]] == []
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"))


def test_a_file_that_is_a_link_elsewhere_is_read_for_a_verification(file: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.onnx").symlink_to(file)
    proto = to_proto(load(tmp_path / "snapshot"), tmp_path / "snapshot")
    assert proto == onnx.load(file)


def test_the_file_is_closed_with_the_last_weight(file: Path) -> None:
    def links() -> list[str]:
        return [os.readlink(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd") if _exists(one)]

    model = load(file)
    assert str(file.resolve()) in links()
    del model
    import gc

    gc.collect()
    assert str(file.resolve()) not in links()


def _exists(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


def test_data_of_another_size_is_rejected(file: Path) -> None:
    model = onnx.load(file)
    tensor = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    tensor.raw_data = tensor.raw_data[:-4]
    file.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidModelError, match=r"expected \d+ bytes for FLOAT.*export it again"):
        load(file)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_are_rejected_or_loaded_as_before(seed: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    content = bytearray(file.read_bytes())
    if seed % 2:
        del content[random.integers(1, len(content)) :]
    for place in random.integers(0, len(content), 3):
        content[place] = random.integers(0, 256)
    file.write_bytes(content)

    def outcome() -> object:
        try:
            return to_proto(load(file)).SerializeToString(deterministic=True)
        except KvsurgeonError as error:
            return type(error)

    found = outcome()
    monkeypatch.setattr(stored_weights, "LARGE", 1 << 40)
    expected = outcome()
    assert found == expected
