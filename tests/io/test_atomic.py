"""Readers find the old file or the new one, whatever happens to the writer."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kvsurgeon.errors import UsageError
from kvsurgeon.io import atomic_write, load, save
from kvsurgeon.io.atomic_write import atomic_open, file_transaction, remove_stale

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks and signals of POSIX")

SAVE_FOR_EVER = """
import sys
from pathlib import Path
from kvsurgeon.io import load, save
from kvsurgeon.io import atomic_write
path = Path(sys.argv[1])
if sys.argv[2] == "hidden":
    atomic_write._UNNAMED = 0
model = load(path)
number = 0
while True:
    number += 1
    model.doc_string = str(number)
    save(model, path)
    print(number, flush=True)
"""


def leftovers(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if ".kvsurgeon-" in file.name]


@pytest.fixture
def hidden_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a file system without unnamed files."""
    monkeypatch.setattr(atomic_write, "_UNNAMED", 0)


@pytest.mark.parametrize("kind", ["unnamed", "hidden"])
def test_a_killed_process_leaves_a_complete_model(proto: onnx.ModelProto, tmp_path: Path, kind: str) -> None:
    if kind == "unnamed" and not atomic_write._UNNAMED:
        pytest.skip("no files without a name here")
    model = load(proto)
    large = ir.tensor(np.ones(2_000_000, np.float32), name="large")  # 8 MB: a save takes long enough to be hit
    model.graph.register_initializer(ir.Value(name="large", const_value=large))
    path = save(model, tmp_path / "model.onnx")
    random_delay = random.Random(0)
    found = {model.doc_string}
    interrupted = 0
    for kills in range(60):
        if kills >= 6 and len(found) > 1 and (interrupted or kind == "unnamed"):
            break
        writer = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(path), kind], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        with writer.stdout:
            writer.stdout.readline()
            time.sleep(random_delay.uniform(0, 0.1))
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        found.add(load(path).doc_string)
        interrupted += len(leftovers(tmp_path))
        remove_stale(tmp_path)
        assert not leftovers(tmp_path)
    assert len(found) > 1, "no save was ever completed: the kills come too early"
    if kind == "hidden":
        assert interrupted > 0, "no save was ever broken off: the kills prove nothing"
    else:
        assert interrupted <= 1, "files without a name outlived their writers"  # 1: killed while it took its name


def test_the_next_save_removes_the_files_of_a_killed_process(proto: onnx.ModelProto, tmp_path: Path) -> None:
    (tmp_path / ".model.onnx.kvsurgeon-0123abcd").write_bytes(b"half")
    save(load(proto), tmp_path / "model.onnx")
    assert not leftovers(tmp_path)


@pytest.mark.usefixtures("hidden_names")
def test_the_file_of_a_running_writer_is_kept(tmp_path: Path) -> None:
    with atomic_open(tmp_path / "model.onnx") as file:
        file.write(b"half")
        cleaner = (
            f"from pathlib import Path; from kvsurgeon.io.atomic_write import *; remove_stale(Path({str(tmp_path)!r}))"
        )
        subprocess.run([sys.executable, "-c", cleaner], check=True)
        assert len(leftovers(tmp_path)) == 1
    assert (tmp_path / "model.onnx").read_bytes() == b"half"


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_open(path):
        raise KeyboardInterrupt
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("model.onnx", "old")]


def test_a_full_disk_is_reported_in_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=r"cannot write .*model\.onnx`: No space left"),
        atomic_open(tmp_path / "model.onnx"),
    ):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write"), atomic_open(tmp_path / "absent" / "model.onnx"):
        pass


def test_permissions_of_the_old_file_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    path.chmod(0o640)
    with atomic_open(path) as file:
        file.write(b"new")
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.usefixtures("hidden_names")
def test_a_file_that_is_removed_before_it_is_locked_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = atomic_write.fcntl.flock
    taken: list[Path] = []

    def late(*arguments: int) -> None:
        if not taken:
            taken.extend(leftovers(tmp_path))
            taken[0].unlink()
        lock(*arguments)

    monkeypatch.setattr(atomic_write.fcntl, "flock", late)
    with atomic_open(tmp_path / "model.onnx") as file:
        file.write(b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_without_locks_files_are_written_and_stale_ones_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_write, "fcntl", None)
    leftover = tmp_path / ".model.onnx.kvsurgeon-0123abcd"
    leftover.touch()
    remove_stale(tmp_path)
    with atomic_open(tmp_path / "model.onnx") as file:
        file.write(b"new")
    assert (tmp_path / "model.onnx").read_bytes() == b"new"
    assert leftover.exists()


@pytest.mark.parametrize("unnamed", [atomic_write._UNNAMED, 0])
def test_files_of_a_transaction_get_their_names_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: int
) -> None:
    monkeypatch.setattr(atomic_write, "_UNNAMED", unnamed)
    (tmp_path / "source").write_text("linked")
    with file_transaction() as transaction:
        transaction.make_folder(tmp_path / "a" / "b")
        assert transaction.link(tmp_path / "source", tmp_path / "a" / "link")
        for name in ("first", "second"):
            with transaction.create(tmp_path / "a" / "b" / name) as file:
                file.write(name.encode())
        assert not [file for file in tmp_path.rglob("*") if file.name in ("first", "second", "link")]
    assert {file.name: file.read_text() for file in tmp_path.rglob("*") if file.is_file()} == {
        "source": "linked",
        "link": "linked",
        "first": "first",
        "second": "second",
    }


def test_a_failing_transaction_leaves_no_folder(tmp_path: Path) -> None:
    def fail() -> None:
        with file_transaction() as transaction:
            transaction.make_folder(tmp_path / "a" / "b")
            with transaction.create(tmp_path / "a" / "b" / "file"):
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_failing_commit_removes_the_files_that_have_names(tmp_path: Path) -> None:
    def fail() -> None:
        with file_transaction() as transaction:
            for name in ("first", "second"):
                with transaction.create(tmp_path / name) as file:
                    file.write(b"x")
            (tmp_path / "second").mkdir()

    with pytest.raises(UsageError, match=r"cannot write .*second"):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["second"]
