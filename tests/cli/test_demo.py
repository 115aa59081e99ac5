"""The demo does all that it says, on the model that is shipped."""

import pytest

from kvsurgeon.cli import demo
from kvsurgeon.cli.main import run
from kvsurgeon.errors import ParityError


def test_the_demo_shows_everything_and_leaves_a_model_and_a_plot(tmp_path, monkeypatch, capsys):
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


def test_other_words_with_the_cache_are_not_passed_over(tmp_path, monkeypatch):
    generated = demo._generated

    def longer_without(model, prompt, tokens):
        return generated(model, prompt, tokens + 1 if model == demo.SHIPPED else tokens)

    monkeypatch.setattr(demo, "_generated", longer_without)
    with pytest.raises(ParityError, match="other words"):
        demo.show_demo(tmp_path, tokens=4)


def test_a_model_that_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "SHIPPED", tmp_path)
    assert run(["demo", "-o", str(tmp_path / "out")]) == 4
    assert "install kvsurgeon again" in capsys.readouterr().err
