"""The demo, with the built-in model."""

import pytest

from kvsurgeon.cli import demo
from kvsurgeon.cli.main import run
from kvsurgeon.errors import ParityError


def test_the_demo_prints_all_steps_and_writes_model_and_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "TOKENS", 48)
    assert run(["demo"]) == 0
    out = capsys.readouterr().out
    for words in ("1. inspect", "2. inject", "same: largest error", "3. generate 48 tokens", "4. time per token", "●"):
        assert words in out
    made = tmp_path / "kvsurgeon-demo"
    assert (made / "time-per-token.png").read_bytes()[:4] == b"\x89PNG"
    assert {"model.onnx", "tokenizer.json", "config.json"} <= {file.name for file in (made / "model").iterdir()}
    assert run(["generate", str(made / "model"), "--prompt", "It was", "--max-new-tokens", "4"]) == 0


def test_a_different_text_with_the_cache_is_an_error(tmp_path, monkeypatch):
    generated = demo._generate

    def longer_without(model, prompt, tokens):
        return generated(model, prompt, tokens + 1 if model == demo.BUILT_IN_MODEL else tokens)

    monkeypatch.setattr(demo, "_generate", longer_without)
    with pytest.raises(ParityError, match="another text"):
        demo.show_demo(tmp_path, tokens=4)


def test_a_missing_model_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "BUILT_IN_MODEL", tmp_path)
    assert run(["demo", "-o", str(tmp_path / "out")]) == 4
    assert "install kvsurgeon again" in capsys.readouterr().err
