"""`replicate_kv_heads` saves the result only if it generates the same text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

import kvsurgeon
from kvsurgeon.cli.main import run
from kvsurgeon.errors import ParityError, UsageError
from kvsurgeon.io import load, weight_files
from kvsurgeon.workflow import replication
from kvsurgeon.workflow.keys import capture_keys

DEMO = Path(kvsurgeon.__file__).parent / "demo" / "model"  # 8 query heads, 2 KV heads, 6 layers


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The demo's model in a folder `austen`, its weights in a separate file."""
    folder = tmp_path / "austen"
    shutil.copytree(DEMO, folder)
    proto = onnx.load(folder / "model.onnx")
    onnx.save(proto, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=256)
    return folder


def test_the_result_generates_the_same_text(model: Path) -> None:
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    done = kvsurgeon.replicate_kv_heads(model, prompt="It was late.", repeat=2, max_new_tokens=8, verify=False)
    folder = model.parent / "austen-4kvheads"
    assert done.path == folder / "model.onnx"
    assert done.kv_heads == ((2,) * 6, (4,) * 6)
    assert done.before.tokens == done.after.tokens
    assert done.error < 1e-4
    assert json.loads((folder / "config.json").read_text())["num_key_value_heads"] == 4
    assert {attention.kv_heads for attention in kvsurgeon.inspect(folder).attentions} == {4}
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
    written = next(file for file in weight_files(load(folder)) if file.location != "model.onnx.data")
    assert written.bytes == 6 * 2 * 128 * 4 * 16 * 4  # layers, key and value, hidden, heads, head_dim, float32


def test_replicated_keys_are_equal_and_merged_keys_are_means(model: Path) -> None:
    original = capture_keys(model, prompt="It was late.").keys
    done = kvsurgeon.replicate_kv_heads(model, kv_heads=8, max_new_tokens=2, prompt="It was", verify=False)
    replicated = capture_keys(done.path, prompt="It was late.")
    np.testing.assert_allclose(replicated.keys, np.repeat(original, 4, axis=0), atol=1e-5)
    assert run(["merge-kv-heads", str(model), "--kv-heads", "1", "-o", str(model.parent / "one"), "--no-verify"]) == 0
    merged = capture_keys(model.parent / "one", prompt="It was late.")
    np.testing.assert_allclose(merged.keys[0], original.mean(axis=0), atol=1e-5)


def test_a_result_that_generates_another_text_is_not_saved(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = replication.TextGenerator.generate
    calls: list[int] = []

    def other(writer: replication.TextGenerator, prompt: str, max_new_tokens: int) -> replication.Generation:
        calls.append(1)
        return generate(writer, prompt if len(calls) == 1 else "Another", max_new_tokens=max_new_tokens)

    monkeypatch.setattr(replication.TextGenerator, "generate", other)
    with pytest.raises(ParityError, match="nothing was written"):
        kvsurgeon.replicate_kv_heads(model, prompt="It was late.", max_new_tokens=4, verify=False)
    assert [folder.name for folder in model.parent.iterdir()] == ["austen"]


def test_an_impossible_count_is_an_error_that_lists_the_possible_ones(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="2, 4, 8"):
        kvsurgeon.replicate_kv_heads(model, repeat=3, max_new_tokens=1, prompt="It")
    assert run(["replicate-kv-heads", str(model), "--repeat", "3", "-o", str(model.parent / "out")]) == 2
    assert "2, 4, 8" in capsys.readouterr().err
    assert [folder.name for folder in model.parent.iterdir()] == ["austen"]


def test_the_config_has_the_number_of_layers_with_keys(model: Path) -> None:
    out = model.parent / "shared"
    assert run(["share-kv-layers", str(model), "--kv-layers", "3", "-o", str(out), "--no-verify"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["num_key_value_layers"], config["num_hidden_layers"], config["num_key_value_heads"]) == (3, 6, 2)
