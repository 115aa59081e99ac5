"""Execution providers are chosen by name, for the candidate of a verification and for generation."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
from decoders import Config, Decoder

import kvsurgeon
from kvsurgeon.cli.main import run
from kvsurgeon.errors import UsageError
from kvsurgeon.runtime.providers import find_provider


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(Decoder(Config()).model(), path)
    return path


@pytest.fixture
def opened(monkeypatch):
    """The providers of all sessions that are opened by the runtime, in order."""
    found = []
    original = onnxruntime.InferenceSession

    def open_session(model, options, providers):
        found.append(providers)
        session = original(model, options, providers=["CPUExecutionProvider"])
        monkeypatch.setattr(
            session, "get_providers", lambda: [name for name, _ in providers if name != "LostExecutionProvider"]
        )
        return session

    monkeypatch.setattr("kvsurgeon.runtime.session.ort.InferenceSession", open_session)
    monkeypatch.setattr(
        onnxruntime,
        "get_available_providers",
        lambda: ["OpenVINOExecutionProvider", "LostExecutionProvider", "CPUExecutionProvider"],
    )
    return found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("openvin", "no provider openvin; did you mean openvino"),
        ("tensorrt", "expected one of openvino, lost, cpu"),
        ("cpu{", "expected a provider such as"),
        ("cpu{precision}", "expected a provider such as"),
        ("", "expected a provider such as"),
    ],
)
def test_an_unknown_or_malformed_provider(opened, text, message):
    with pytest.raises(UsageError, match=message):
        find_provider(text)


def test_the_candidate_alone_runs_by_the_provider(opened, model):
    report = kvsurgeon.verify(model, model, effort="quick", provider="OpenVINO{precision=FP32,num_of_threads=1}")
    assert report.ok
    cpu, chosen = [("CPUExecutionProvider", {})], "OpenVINOExecutionProvider"
    assert cpu in opened
    assert [(chosen, {"precision": "FP32", "num_of_threads": "1"})] in opened


def test_text_is_generated_by_the_provider(opened, model):
    assert kvsurgeon.generate(model, [1, 2], max_new_tokens=2, provider="openvino").tokens
    assert opened == [[("OpenVINOExecutionProvider", {})]]


def test_a_provider_whose_device_is_missing_is_not_replaced_by_the_cpu(opened, model):
    with pytest.raises(UsageError, match="the provider lost cannot be used"):
        kvsurgeon.generate(model, [1, 2], max_new_tokens=2, provider="lost")
    assert not kvsurgeon.verify(model, model, effort="quick", provider="lost").ok


def test_a_provider_that_is_not_installed_is_wrong_usage(model, capsys):
    assert run(["generate", str(model), "--prompt", "1,2", "--provider", "other"]) == 2
    assert "has no provider other; expected one of" in capsys.readouterr().err
    assert run(["verify", str(model), str(model), "--provider", "other", "--loss"]) == 2
    assert "found --loss" in capsys.readouterr().err
