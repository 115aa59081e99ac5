"""A saved model is complete, with its data and side files, and no other file changes."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from kvsurgeon.errors import UsageError, WeightsError
from kvsurgeon.io import data_file, load, save, to_proto, weight_files


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def run(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((2, 4), np.float32)})[0]


def test_an_unchanged_file_is_saved_byte_for_byte(external: Path, tmp_path: Path) -> None:
    saved = save(load(external), tmp_path / "out" / "copy.onnx")
    assert saved == tmp_path / "out" / "copy.onnx"
    assert saved.read_bytes() == external.read_bytes()


def test_weights_are_linked_and_side_files_copied_into_another_folder(external: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    saved = save(load(external), out, link_weights=True)
    assert names(out) == {"model.onnx", "model.data", "config.json", "tokenizer.json", "merges.txt"}
    assert os.path.samefile(out / "model.data", external.with_name("model.data"))
    assert not os.path.samefile(out / "config.json", external.with_name("config.json"))
    np.testing.assert_array_equal(run(saved), run(external))
    tensor = load(saved).graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy()[0, 1] == 1.0  # several links are no obstacle to reading


def test_copied_weights_can_be_read_by_onnx(external: Path, tmp_path: Path) -> None:
    saved = save(load(external), tmp_path / "out")
    assert not os.path.samefile(saved.with_name("model.data"), external.with_name("model.data"))
    onnx.checker.check_model(str(saved))
    onnx.load(saved)


def test_weights_are_copied_where_they_cannot_be_linked(
    external: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: object, **__: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", no_link)
    reports: list[tuple[str, int, int]] = []
    for _ in range(2):  # the second time the copy is recognized
        saved = save(
            load(external), tmp_path / "out", link_weights=True, progress=lambda *report: reports.append(report)
        )
    assert reports[0] == ("model.data", 80, 80)
    assert saved.with_name("model.data").read_bytes() == external.with_name("model.data").read_bytes()


def test_copies_of_sparse_files_are_sparse(external: Path, tmp_path: Path) -> None:
    data = external.with_name("model.data")
    with data.open("r+b") as file:
        file.truncate(2**32)
        file.seek(2**31)
        file.write(b"island")
    copy = save(load(external), tmp_path / "out").with_name("model.data")
    assert copy.stat().st_size == 2**32
    with copy.open("rb") as file:
        file.seek(2**31)
        assert file.read(6) == b"island"
    if data.stat().st_blocks < 2**20:
        assert copy.stat().st_blocks < 2**20


def test_saving_twice_gives_the_same_files(external: Path, tmp_path: Path) -> None:
    for _ in range(2):
        save(load(external), tmp_path / "out")
    assert names(tmp_path / "out") == {"model.onnx", "model.data", "config.json", "tokenizer.json", "merges.txt"}


def test_a_different_data_file_is_never_overwritten(external: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.data").write_bytes(b"precious")
    with pytest.raises(UsageError, match="found another file; choose another folder"):
        save(load(external), out)
    assert names(out) == {"model.data"}
    assert (out / "model.data").read_bytes() == b"precious"


def test_a_dangling_link_at_the_name_of_data_is_not_followed(external: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="found another file"):
        save(load(external), tmp_path / "out")
    assert not (tmp_path / "elsewhere").exists()


def test_in_the_same_folder_only_the_model_changes(external: Path) -> None:
    before = {file: (file.stat().st_ino, file.read_bytes()) for file in external.parent.iterdir()}
    model = load(external)
    model.doc_string = "edited"
    assert save(model, external.parent) == external
    changed = {
        file for file, (inode, text) in before.items() if (file.stat().st_ino, file.read_bytes()) != (inode, text)
    }
    assert changed == {external}
    assert load(external).doc_string == "edited"
    assert set(external.parent.iterdir()) == set(before)


def test_a_model_can_be_saved_in_the_same_folder_under_another_name(external: Path) -> None:
    saved = save(load(external), external.with_name("cached.onnx"))
    assert weight_files(load(saved)) == weight_files(load(external))
    assert external.with_name("model.data").stat().st_nlink == 1


def test_side_files_are_above_an_onnx_folder(external: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    shutil.copytree(external.parent, hub / "onnx")
    (hub / "config.json").write_text("the hub's")
    (hub / "onnx" / "config.json").unlink()
    model = load(hub)
    assert save(model, hub) == hub / "onnx" / "model.onnx"
    save(model, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "the hub's"
    assert (tmp_path / "out" / "model.data").is_file()


def test_a_model_keeps_the_name_of_its_file(external: Path, tmp_path: Path) -> None:
    named = external.rename(external.with_name("decoder.onnx"))
    assert save(load(named), tmp_path / "out").name == "decoder.onnx"
    assert save(load(named), tmp_path / "out-1.5").name == "decoder.onnx"  # a folder, dot or not


def test_data_in_a_subfolder_stays_there(external: Path, tmp_path: Path) -> None:
    proto = onnx.load(external, load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = "weights/part.data"
    external.write_bytes(proto.SerializeToString())
    external.with_name("weights").mkdir()
    external.with_name("model.data").rename(external.with_name("weights") / "part.data")
    assert "weights/part.data" in names(save(load(external), tmp_path / "out").parent)


def test_a_proto_is_saved_in_the_folder_of_its_data(external: Path, tmp_path: Path) -> None:
    proto = onnx.load(external, load_external_data=False)
    with pytest.raises(WeightsError, match="load the model with the folder of its data"):
        save(load(proto), tmp_path / "out")
    assert save(load(proto), external.with_name("other.onnx")).is_file()
    saved = save(load(proto, folder=external.parent), tmp_path / "out", source=external)
    assert names(saved.parent) == {"model.onnx", "model.data", "config.json", "tokenizer.json", "merges.txt"}
    assert to_proto(load(proto)) == proto


def test_a_proto_without_a_source_is_called_model(proto: onnx.ModelProto, tmp_path: Path) -> None:
    assert save(load(proto), tmp_path / "out") == tmp_path / "out" / "model.onnx"
    assert names(tmp_path / "out") == {"model.onnx"}


def test_a_location_outside_the_folder_is_rejected(proto: onnx.ModelProto, tmp_path: Path) -> None:
    model = load(proto)
    model.graph.initializers["w"].const_value = ir.ExternalTensor(
        "../w.data", 0, 64, ir.DataType.FLOAT, shape=ir.Shape([4, 4]), name="w", base_dir=tmp_path
    )
    with pytest.raises(WeightsError, match=r"found `\.\./w\.data` - at `w`"):
        save(model, tmp_path / "out")


def test_embedded_weights_get_a_data_file_above_the_limit(
    proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(proto)
    calls: list[str] = []

    def double() -> ir.Tensor:
        calls.append("evaluated")
        return ir.tensor(np.full((4, 4), 2.0, np.float32), name="w")

    lazy = ir.LazyTensor(double, dtype=ir.DataType.FLOAT, shape=ir.Shape([4, 4]), name="w", cache=False)
    model.graph.initializers["w"].const_value = lazy
    embedded = save(model, tmp_path / "embedded")
    assert names(tmp_path / "embedded") == {"model.onnx"}
    monkeypatch.setattr(data_file, "EMBED_LIMIT", 16)
    monkeypatch.setattr(data_file, "_SMALLEST", 32)
    reports: list[tuple[str, int, int]] = []
    calls.clear()
    for name in ("model.onnx.data", "model.onnx-2.data"):
        saved = save(model, tmp_path / "large", progress=lambda *report: reports.append(report))
        (file,) = weight_files(load(saved))
        assert (file.location, file.bytes) == (name, 64)  # the old file stays complete until the model is replaced
    assert calls == ["evaluated"] * 2
    assert reports[0] == ("model.onnx.data", 64, 64)
    assert model.graph.initializers["w"].const_value is lazy
    np.testing.assert_array_equal(run(saved), run(embedded))
    onnx.checker.check_model(str(saved))


def test_a_full_disk_is_reported_before_copying(
    external: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_file.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"expected 80 bytes of free space for .*, found 1;"):
        save(load(external), tmp_path / "out")


def test_an_invalid_destination_is_rejected(external: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="found the file"):
        save(load(external), tmp_path / "file")
    with pytest.raises(UsageError, match=r"cannot write .*: Not a directory"):
        save(load(external), tmp_path / "file" / "model.onnx")


def test_a_graph_larger_than_a_protobuf_is_reported(
    proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Huge:
        def SerializeToString(self) -> bytes:  # noqa: N802
            raise ValueError("exceeds maximum protobuf size of 2GB")

    monkeypatch.setattr("kvsurgeon.io.saving.to_proto", lambda _: Huge())
    with pytest.raises(UsageError, match="at most 2 GiB"):
        save(load(proto), tmp_path / "out")
    assert not names(tmp_path / "out")


def test_loading_and_saving_are_silent_in_a_pipe(
    external: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        save(load(external), tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_terminal_shows_a_bar(external: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    save(load(external), tmp_path / "out")
    assert "model.data" in terminal.getvalue()
