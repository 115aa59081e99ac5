"""Accuracy loss equals its formulas, by layer and with a cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoders import Config, Decoder, in_bfloat16
from onnx import numpy_helper
from onnxruntime.quantization import quantize_dynamic

import kvsurgeon
from kvsurgeon.cli.main import run
from kvsurgeon.errors import InputError, ParityError, UsageError
from kvsurgeon.parity import loss, measure_loss
from kvsurgeon.runtime import TextGenerator
from kvsurgeon.workflow.run_and_save import run_and_save

DEMO = Path(kvsurgeon.__file__).parent / "demo" / "model"
FEW = "It was late. They left the house without a word, and nobody asked them where they went."


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WINDOW", "TEXT_WINDOW"):
        monkeypatch.setattr(loss, name, 16)
        monkeypatch.setattr(loss, f"{name}S", 2)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """The demo's model with the value projection of its fourth layer made smaller."""
    folder = tmp_path / "damaged"
    shutil.copytree(DEMO, folder)
    proto = onnx.load(folder / "model.onnx")
    name = kvsurgeon.inspect(DEMO).attentions[3].value.initializers[0]  # type: ignore[union-attr]
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(0.5), name))
    onnx.save(proto, folder / "model.onnx")
    return folder


@pytest.mark.usefixtures("short")
def test_loss_of_equal_models_is_zero() -> None:
    found = measure_loss(DEMO, DEMO)
    assert (found.kl_divergence, found.agreement, found.tokens) == (0.0, 1.0, 32)
    assert found.reference_perplexity == found.candidate_perplexity
    assert 5 < found.reference_perplexity < 60  # it was trained on such texts
    assert found.text == "the bundled sample"


@pytest.mark.usefixtures("short")
def test_numbers_equal_the_formulas(damaged: Path, tmp_path: Path) -> None:
    text = tmp_path / "few.txt"
    text.write_text(FEW)
    found = measure_loss(DEMO, damaged, text=text)
    generator = TextGenerator(DEMO)
    ids = np.array(generator.encode(FEW)[0])[: found.tokens + 1]
    old, new = (_log_softmax(folder, ids[:-1], 16) for folder in (DEMO, damaged))
    places = np.arange(len(ids) - 1)
    assert found.text == "few.txt"
    assert found.kl_divergence == pytest.approx(np.mean(np.sum(np.exp(old) * (old - new), axis=-1)), rel=1e-3)
    assert found.reference_perplexity == pytest.approx(np.exp(-old[places, ids[1:]].mean()), rel=1e-4)
    assert found.candidate_perplexity == pytest.approx(np.exp(-new[places, ids[1:]].mean()), rel=1e-4)
    assert found.agreement == np.mean(old.argmax(-1) == new.argmax(-1))
    assert found.kl_divergence > 1e-4


def _log_softmax(folder: Path, ids: np.ndarray, window: int) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    parts = []
    for start in range(0, len(ids), window):
        tokens = ids[None, start : start + window]
        logits = session.run(["logits"], {"input_ids": tokens, "attention_mask": np.ones_like(tokens)})[0][0]
        logits = logits.astype(np.float64)
        parts.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return np.concatenate(parts)


@pytest.mark.usefixtures("short")
def test_layers_differ_from_the_changed_one_on(damaged: Path) -> None:
    found = kvsurgeon.measure_loss(DEMO, damaged, per_layer=True)
    errors = found.layer_errors
    assert len(errors) == 6
    assert errors[:3] == (0.0,) * 3
    assert errors[3] == pytest.approx(0.5, abs=1e-3)  # the values were halved
    assert all(0 < error < 1 for error in errors[4:])


@pytest.mark.usefixtures("short")
def test_a_cache_loses_nothing(tmp_path: Path) -> None:
    done = kvsurgeon.inject(DEMO, tmp_path / "out", verify=False)
    found = measure_loss(DEMO, done.path.parent)  # type: ignore[union-attr]
    assert found.agreement == 1.0
    assert found.kl_divergence < 1e-9


@pytest.mark.usefixtures("short")
def test_windows_fit_the_cache_of_the_candidate(tmp_path: Path) -> None:
    in_place = kvsurgeon.Pipeline.parse("inject{cache=static,max-length=12}")
    done = run_and_save(DEMO, in_place, tmp_path / "out", verify=False)
    assert measure_loss(DEMO, done.path.parent).tokens == 16  # two windows of half of 16


@pytest.mark.usefixtures("short")
def test_a_wrong_cache_is_an_error(tmp_path: Path) -> None:
    path = kvsurgeon.inject(DEMO, tmp_path / "out", verify=False).path
    proto = onnx.load(path)
    concat = next(node for node in proto.graph.node if "present.2.key" in node.output)
    concat.input[0], concat.input[1] = concat.input[1], concat.input[0]  # new rows before the past
    onnx.save(proto, path)
    with pytest.raises(ParityError, match="with and without its cache"):
        measure_loss(DEMO, path)


@pytest.mark.usefixtures("short")
def test_bfloat16_is_measured_in_float32() -> None:
    models = [in_bfloat16(Decoder(Config(seed=seed)).model()) for seed in (0, 0, 1)]
    assert measure_loss(*models[:2]).kl_divergence == 0
    assert measure_loss(*models[1:]).kl_divergence > 0.01


@pytest.mark.usefixtures("short")
def test_ranges_over_the_tokens_of_a_call_are_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "dynamic"
    shutil.copytree(DEMO, folder)
    quantize_dynamic(DEMO / "model.onnx", folder / "model.onnx")
    path = kvsurgeon.inject(folder, tmp_path / "out", verify=False).path
    exact = loss.TOLERANCES["dynamic"].with_bound(1e-9)
    monkeypatch.setitem(loss.TOLERANCES, "dynamic", exact)
    assert measure_loss(folder, path).kl_divergence < 0.1
    monkeypatch.setattr(loss, "ROUNDINGS", 0)
    with pytest.raises(ParityError, match="with and without its cache"):
        measure_loss(folder, path)


@pytest.mark.usefixtures("short")
def test_token_ids_are_random_without_a_tokenizer(damaged: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (damaged / name).unlink()
    found = measure_loss(damaged, damaged)
    assert (found.text, found.tokens, found.kl_divergence) == ("random token IDs", 32, 0.0)
    with pytest.raises(UsageError, match=r"a text and tokenizer\.json next to the model"):
        measure_loss(damaged, damaged, text=DEMO / "sample.txt")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("text", "match"), [("", "expected a text of more than 2 tokens"), (None, "cannot read")])
def test_reports_a_text_that_cannot_be_used(tmp_path: Path, text: str | None, match: str) -> None:
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises((UsageError, InputError), match=match):
        measure_loss(DEMO, DEMO, text=path)


@pytest.mark.usefixtures("short")
def test_verify_prints_the_loss(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(DEMO), str(damaged)]) == 1  # other logits
    assert "of its spread at" in capsys.readouterr().out
    assert run(["verify", str(DEMO), str(damaged), "--loss", "--per-layer"]) == 0
    said = capsys.readouterr().out
    assert "KL divergence" in said
    assert "50.0%" in said
    assert run(["verify", str(DEMO), str(damaged), "--text", str(DEMO / "sample.txt"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["text"] == "sample.txt"
    assert facts["reference_perplexity"] < facts["candidate_perplexity"]
    assert run(["verify", str(DEMO), str(DEMO), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["ok"], facts["verdict"], facts["problems"]) == (True, "same", [])


@pytest.mark.usefixtures("short")
def test_repeats_the_text_in_each_row_of_a_fixed_batch(damaged: Path, tmp_path: Path) -> None:
    cached = kvsurgeon.inject(damaged, tmp_path / "cached", verify=False).path
    assert cached is not None
    of_two = tmp_path / "of_two"
    run_and_save(cached, kvsurgeon.Pipeline.parse("rename-dims{dims=batch_size=2}"), of_two, verify=False)
    expected = kvsurgeon.measure_loss(DEMO, cached.parent, per_layer=True)
    found = kvsurgeon.measure_loss(DEMO, of_two, per_layer=True)
    assert found.tokens == expected.tokens
    assert found.kl_divergence == pytest.approx(expected.kl_divergence, rel=1e-3)
    assert found.candidate_perplexity == pytest.approx(expected.candidate_perplexity, rel=1e-4)
    assert found.layer_errors == pytest.approx(expected.layer_errors, abs=1e-3)
