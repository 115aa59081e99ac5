"""Errors of the commands that change heads: one line, an exit code, no partial output, the original unchanged.

Full disks and read-only folders are real: a small file system in a mount namespace, and a process without superuser
rights. If the system allows neither, these tests are skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from grouped import grouped_attention
from written import read

import kvsurgeon
from kvsurgeon import io
from kvsurgeon.cli.main import run

DEMO = Path(kvsurgeon.__file__).parent / "demo" / "model"  # 8 query heads, 2 KV heads, 6 layers
COMMANDS = {
    "replicate-kv-heads": ["--repeat", "2"],
    "expand-gqa": [],
    "merge-kv-heads": ["--kv-heads", "1"],
    "share-kv-layers": ["--kv-layers", "3"],
}
IMPOSSIBLE = [
    ("replicate-kv-heads", ["--repeat", "3"], "expected one of 2, 4, 8 KV heads, found 6"),
    ("replicate-kv-heads", ["--kv-heads", "3"], "expected one of 2, 4, 8 KV heads, found 3"),
    ("replicate-kv-heads", ["--kv-heads", "1"], "expected one of 2, 4, 8 KV heads, found 1"),
    ("replicate-kv-heads", ["--repeat", "0"], "expected one of 2, 4, 8 KV heads, found 0"),
    ("replicate-kv-heads", ["--repeat", "2", "--kv-heads", "4"], "found --repeat and --kv-heads"),
    ("replicate-kv-heads", [], "expected one of --repeat and --kv-heads, found none"),
    ("share-kv-layers", ["--map", "0,0,2,2,4"], "a layer for each of 6 layers, found 5"),
    ("share-kv-layers", ["--map", "1,0,2,2,4,4"], "reads itself or an earlier layer"),
    ("share-kv-layers", ["--kv-layers", "2", "--map", "0,0,0,3,3,3"], "found --kv-layers and --map"),
    ("merge-kv-heads", ["--kv-heads", "4"], "expected one of 1, 2 KV heads, found 4"),
    ("merge-kv-heads", ["--kv-heads", "0"], "expected one of 1, 2 KV heads, found 0"),
    ("share-kv-layers", ["--kv-layers", "7"], "expected 1 to 6, found 7"),
    ("share-kv-layers", ["--kv-layers", "0"], "expected 1 to 6, found 0"),
    ("share-kv-layers", ["--map", "0,0,1,3,3,3"], "reads itself or an earlier layer"),
]
UNPROVABLE = grouped_attention(keys="k0 = MatMul(x, k_weight) k = Softmax<axis = -1>(k0)")
# Runs commands, and prints for each its exit code, its stderr, and the files in the output folder.
CHILD = """
import contextlib, io, json, os, sys
from kvsurgeon.cli.main import run
folder, *commands = json.loads(sys.argv[1])
for command in commands:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = run(command)
    print(json.dumps([code, said.getvalue(), sorted(os.listdir(folder))]))
"""


def digest(folder: Path) -> dict[str, str]:
    return {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in sorted(folder.iterdir())}


@pytest.mark.parametrize("command", COMMANDS)
def test_only_lossy_commands_have_options_for_the_loss(command, capsys):
    assert run([command, "--help"]) == 0
    said = capsys.readouterr().out
    lossy = command in ("merge-kv-heads", "share-kv-layers")
    assert ("--per-layer" in said, "--text" in said) == (lossy, lossy)


def works(*command: str) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


SMALL_DISK = ("unshare", "--map-root-user", "--mount", "sh", "-c")
WITHOUT_RIGHTS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
needs_mounts = pytest.mark.skipif(
    not works(*SMALL_DISK, "mount -t tmpfs -o size=64k tmpfs /mnt"), reason="a small file system cannot be mounted here"
)
needs_rights = pytest.mark.skipif(
    os.name != "posix" or (os.geteuid() == 0 and not works(*WITHOUT_RIGHTS, "true")),
    reason="the superuser's rights cannot be given up here",
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A model with external data."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    io.save(io.load(DEMO), folder, source=DEMO, pack=True)
    return folder


@pytest.mark.parametrize(("command", "options", "said"), IMPOSSIBLE)
def test_impossible_head_counts_are_errors(command, options, said, tmp_path, capsys):
    assert run([command, str(DEMO), *options, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["merge-kv-heads", "share-kv-layers"])
def test_the_loss_is_measured_on_a_custom_text(command, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("It was late, and nobody had come to the door since the rain began. " * 9)
    options = [*COMMANDS[command], "--text", str(tmp_path / "own.txt"), "--per-layer"]

    assert run([command, str(DEMO), *options, "-o", str(tmp_path / "out")]) == 0

    said = capsys.readouterr().out
    assert "loss on the second half of own.txt" in said
    assert re.findall(r"^ *(\d) +[\d.]+% *$", said, re.MULTILINE) == [*"012345"]


@pytest.mark.parametrize("said", ['{"num_', "[1, 2]"])
def test_a_config_that_cannot_be_updated_is_noted(said, packed, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(packed, model)
    (model / "config.json").write_text(said)

    assert run(["expand-gqa", str(model), "--no-verify", "-o", str(tmp_path / "out")]) == 0

    assert "note: config.json is not readable" in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").read_text() == said


@pytest.mark.parametrize("command", COMMANDS)
def test_untraceable_heads_are_an_error(command, tmp_path, capsys):
    model = tmp_path / "model.onnx"
    model.write_bytes(read(UNPROVABLE).SerializeToString())
    before = digest(tmp_path)
    options = ["--kv-layers", "1"] if command == "share-kv-layers" else COMMANDS[command]

    code = run([command, str(model), *options, "-o", str(tmp_path / "out")])

    error = capsys.readouterr().err
    assert code == 3
    assert error.count("\n") == 1
    if command != "share-kv-layers":  # there is one layer: nothing to be shared
        assert re.search(r"error: Softmax: .*heads.* - at `k` \[KVS-3\d\d\]$", error)
    assert digest(tmp_path) == before


@needs_mounts
def test_nothing_is_left_on_a_full_disk(packed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    before = digest(packed)
    commands = [
        [command, str(packed), *options, "--no-verify", "-o", str(disk / "out"), *more]
        for command, options in COMMANDS.items()
        for more in ([], ["--pack"])
    ]
    given = json.dumps([str(disk), *commands])
    script = f'mount -t tmpfs -o size=300k tmpfs "{disk}" && "$0" -c "$1" "$2"'

    found = subprocess.run([*SMALL_DISK, script, sys.executable, CHILD, given], capture_output=True, text=True)

    assert found.returncode == 0, found.stderr
    answers = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(answers) == len(commands)
    for code, said, left in answers:
        assert code == 2
        assert said.count("\n") == 1
        assert "bytes of free space for" in said or "No space left" in said
        assert left == []
    assert digest(packed) == before


@needs_mounts
@pytest.mark.parametrize("command", ["replicate-kv-heads", "expand-gqa"])
def test_a_full_disk_keeps_the_model_that_would_be_replaced(command, packed, tmp_path):
    """The model would be replaced, and there is space for it only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(one.stat().st_size for one in packed.iterdir()) // 1024 + 100
    inside = [str(disk), [command, str(disk), *COMMANDS[command], "--no-verify", "-o", str(disk)]]
    script = (
        f'mount -t tmpfs -o size={size}k tmpfs "{disk}" && cp "{packed}"/* "{disk}" && "$0" -c "$1" "$2"'
        f' && cd "{disk}" && sha256sum *'
    )

    found = subprocess.run(
        [*SMALL_DISK, script, sys.executable, CHILD, json.dumps(inside)], capture_output=True, text=True
    )

    assert found.returncode == 0, found.stderr
    answer, *sums = found.stdout.splitlines()
    code, said, left = json.loads(answer)
    assert (code, said.count("\n")) == (2, 1)
    assert left == sorted(digest(packed))
    assert dict(line.split()[::-1] for line in sums) == digest(packed)


@needs_rights
@pytest.mark.parametrize("inside", [False, True])
def test_a_read_only_folder_is_an_error(inside, packed, tmp_path):
    """The output folder, or the folder of the model itself."""
    folder = tmp_path / "folder"
    shutil.copytree(packed, folder)
    before = digest(folder)
    target = folder if inside else folder / "out"
    commands = [
        [command, str(packed if not inside else folder), *options, "--no-verify", "--force", "-o", str(target)]
        for command, options in COMMANDS.items()
    ]
    folder.chmod(0o555)
    rights = WITHOUT_RIGHTS if os.geteuid() == 0 else ()

    found = subprocess.run(
        [*rights, sys.executable, "-c", CHILD, json.dumps([str(folder), *commands])], capture_output=True, text=True
    )

    folder.chmod(0o755)
    assert found.returncode == 0, found.stderr
    answers = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(answers) == len(COMMANDS)
    for code, said, left in answers:
        assert (code, said.count("\n")) == (2, 1)
        assert "Permission denied" in said
        assert left == sorted(before)
    assert digest(folder) == before
