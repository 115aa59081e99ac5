"""`config.json` says how many heads the graph has, under whatever key its family says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from kvsurgeon.errors import UsageError
from kvsurgeon.io import load, save
from kvsurgeon.io.model_config import HeadChange, ModelHeads, record_head_change, updated_config


def change(
    before: int | list[int], after: int | list[int], *, query: int = 8, layers: tuple[int, int] = (4, 4)
) -> HeadChange:
    def heads(kv: int | list[int], kv_layers: int) -> ModelHeads:
        return ModelHeads(query=query, kv=tuple(kv) if isinstance(kv, list) else (kv,) * 4, kv_layers=kv_layers)

    return heads(before, layers[0]), heads(after, layers[1])


LLAMA = {"num_attention_heads": 8, "num_hidden_layers": 4, "hidden_size": 64, "num_key_value_heads": 2}
CONFIGS: dict[str, tuple[dict[str, Any], HeadChange, dict[str, Any]]] = {
    "the usual key": (LLAMA, change(2, 4), LLAMA | {"num_key_value_heads": 4}),
    "chatglm": (
        {"num_attention_heads": 8, "kv_channels": 2, "multi_query_attention": True, "multi_query_group_num": 2},
        change(2, 4),
        {"num_attention_heads": 8, "kv_channels": 2, "multi_query_attention": False, "multi_query_group_num": 4},
    ),
    "falcon, old": (
        {"num_attention_heads": 8, "num_kv_heads": 8, "multi_query": True, "new_decoder_architecture": False},
        change(1, 4),
        {"num_attention_heads": 8, "num_kv_heads": 4, "multi_query": False, "new_decoder_architecture": False},
    ),
    "n_head_kv": (
        {"n_head": 8, "n_head_kv": 2, "n_layer": 4},
        change(2, 8),
        {"n_head": 8, "n_head_kv": 8, "n_layer": 4},
    ),
    "mpt, nested": (
        {"n_heads": 8, "attn_config": {"kv_n_heads": 8, "alibi": True}},
        change(8, 2),
        {"n_heads": 8, "attn_config": {"kv_n_heads": 2, "alibi": True}},
    ),
    "openelm, a number for each layer": (
        {"num_kv_heads": [1, 2, 2, 4], "num_query_heads": [4, 8, 8, 8]},
        change([1, 2, 2, 4], [2, 4, 4, 8]),
        {"num_kv_heads": [2, 4, 4, 8], "num_query_heads": [4, 8, 8, 8]},
    ),
    "none: every query head has its own": (
        {"num_attention_heads": 8, "num_hidden_layers": 4},
        change(8, 2),
        {"num_attention_heads": 8, "num_hidden_layers": 4, "num_key_value_heads": 2},
    ),
    "a flag that says it all": (
        {"n_head": 8, "multi_query": True},
        change(1, 8),
        {"n_head": 8, "multi_query": False},
    ),
    "a flag that cannot say it": (
        {"n_head": 8, "multi_query": True},
        change(1, 4),
        {"n_head": 8, "multi_query": False, "num_key_value_heads": 4},
    ),
    "text and vision": (
        {"vision_config": {"num_attention_heads": 2, "num_key_value_heads": 2}, "text_config": LLAMA},
        change(2, 4),
        {
            "vision_config": {"num_attention_heads": 2, "num_key_value_heads": 2},
            "text_config": LLAMA | {"num_key_value_heads": 4},
        },
    ),
    "a number that was wrong before": (LLAMA, change(4, 8), LLAMA | {"num_key_value_heads": 8}),
    "words that mean something else": (
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 2,
            "kv_lora_rank": 2,
            "head_dim": 2,
        },
        change(2, 4),
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "num_kv_shared_layers": 2,
            "kv_lora_rank": 2,
            "head_dim": 2,
        },
    ),
    "fewer layers with keys": (LLAMA, change(2, 2, layers=(4, 1)), LLAMA | {"num_key_value_layers": 1}),
    "fewer layers, nested": (
        {"text_config": LLAMA},
        change(2, 2, layers=(4, 1)),
        {"text_config": LLAMA | {"num_key_value_layers": 1}},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_is_updated(name: str) -> None:
    config, changed, expected = CONFIGS[name]
    given = json.dumps(config)
    assert updated_config(config, [changed]) == expected
    assert json.dumps(config) == given
    assert updated_config(expected, [changed]) == expected  # once more, as when the same model is saved twice


def test_several_changes_are_applied_in_order() -> None:
    both = [change(2, 4), change(4, 1, layers=(4, 2))]
    assert updated_config(LLAMA, both) == LLAMA | {"num_key_value_heads": 1, "num_key_value_layers": 2}


def test_a_saved_model_has_the_updated_config(external: Path, tmp_path: Path) -> None:
    config = external.with_name("config.json")
    config.write_text(json.dumps(LLAMA | {"name": "é"}))
    model = load(external)
    record_head_change(model, change(2, 4))
    out = tmp_path / "out"
    save(model, out)
    assert json.loads((out / "config.json").read_text("utf-8")) == LLAMA | {"num_key_value_heads": 4, "name": "é"}
    assert json.loads(config.read_text("utf-8"))["num_key_value_heads"] == 2
    with pytest.raises(UsageError, match="found another file"):
        save(model, external)
    save(model, external, force=True)
    assert json.loads(config.read_text("utf-8"))["num_key_value_heads"] == 4


def test_the_config_of_a_runtime_gets_no_new_keys(external: Path, tmp_path: Path) -> None:
    decoder = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 4}
    path = external.with_name("genai_config.json")
    path.write_text(json.dumps({"model": {"decoder": decoder}, "search": {"num_beams": 1}}))
    model = load(external)
    record_head_change(model, change(2, 4, layers=(4, 2)))
    save(model, tmp_path / "out")
    found = json.loads((tmp_path / "out" / path.name).read_text())
    assert found == {"model": {"decoder": decoder | {"num_key_value_heads": 4}}, "search": {"num_beams": 1}}


def test_the_config_above_an_onnx_folder_is_updated_in_place(external: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "onnx"
    folder.parent.mkdir()
    external.parent.rename(folder)
    (folder / "config.json").unlink()
    (folder.parent / "config.json").write_text(json.dumps(LLAMA))
    model = load(folder.parent)
    record_head_change(model, change(2, 4))
    save(model, folder.parent, force=True)
    assert json.loads((folder.parent / "config.json").read_text())["num_key_value_heads"] == 4
    assert not (folder / "config.json").exists()


@pytest.mark.parametrize("text", ["no json", "[1]", json.dumps({"unrelated": 1}) + "   "])
def test_a_config_without_head_counts_is_copied(external: Path, tmp_path: Path, text: str) -> None:
    external.with_name("config.json").write_text(text)
    save(load(external), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == text


def test_a_model_without_a_config_gets_none(proto: onnx.ModelProto, tmp_path: Path) -> None:
    model = load(proto)
    record_head_change(model, change(2, 4))
    save(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
