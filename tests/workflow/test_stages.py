"""Each command runs analysis and proof once for each graph."""

from __future__ import annotations

import sys

import pytest
from decoders import Config, Decoder

import kvsurgeon
from kvsurgeon.analysis import analysis
from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject
from kvsurgeon.proof import proof
from kvsurgeon.workflow.build_target import build_target, check_target
from kvsurgeon.workflow.keys import capture_keys

# Targets whose passes change the graph between two analyses.
SEVERAL_GRAPHS = {
    "deepsparse": 2,  # add-position-ids analyzes the model before it adds the input
    "genai-shared-buffer": 2,  # fuse-attention removes the cache, and injects it again
}
# Targets in which a pass after `inject` changes the model: the cache of the result is not read again.
FUSED_OR_REWRITTEN = {"deepsparse", "genai-shared-buffer", "transformers-js"}
TARGETS = (
    "optimum",
    "genai",
    "genai-shared-buffer",
    "transformers-js",
    "deepsparse",
    "openvino",
    "tensorrt",
    "qaic",
    "qnn",
)


@pytest.fixture
def calls(monkeypatch):
    """The number of calls of `analyze` and `prove`, wherever they are imported."""
    counts = {"analyze": 0, "prove": 0}

    def count(name, function):
        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        for module in [one for key, one in sys.modules.items() if key.startswith("kvsurgeon.")]:
            if getattr(module, name, None) is function:
                monkeypatch.setattr(module, name, counted)

    build_target(Decoder(Config(layers=1)).model(), "deepsparse", verify=False)  # imports all modules
    count("analyze", analysis.analyze)
    count("prove", proof.prove)
    return counts


def model(**options):
    return Decoder(Config(layers=2, **options)).model()


def test_inject_analyzes_once_and_finds_the_cache_of_the_result(calls):
    kvsurgeon.inject(model(), verify=False)
    assert calls == {"analyze": 2, "prove": 1}


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_analyzes_once_for_each_graph(calls, target):
    build_target(model(windowed=()), target, verify=False)
    expected, result = SEVERAL_GRAPHS.get(target, 1), int(target not in FUSED_OR_REWRITTEN)
    assert calls == {"analyze": expected + result, "prove": expected}


def test_positions_that_the_model_has_need_no_second_analysis(calls):
    build_target(model(windowed=(), position_ids=True), "deepsparse", verify=False)
    assert calls == {"analyze": 1, "prove": 1}


def test_inspect_for_a_target_analyzes_once(calls):
    check_target(model(), "optimum")
    assert calls == {"analyze": 1, "prove": 1}


def test_expected_sizes_of_the_injector_need_no_second_analysis(calls):
    kvsurgeon.KeyValueCacheInjector(num_attention_heads=4, hidden_size_kv_cache=8).apply(model())
    assert calls == {"analyze": 2, "prove": 1}


def test_captured_keys_need_one_analysis(calls):
    capture_keys(model(), prompt=[1, 2, 3])
    assert calls == {"analyze": 1, "prove": 1}


def test_facts_are_kept_until_the_graph_changes():
    subject = Subject.of(model())
    facts, found = subject.decoder(), subject.analysis()
    assert subject.decoder() is facts
    assert subject.analysis() is found
    assert found.model is subject.model
    Inject().apply(subject)
    assert subject.decoder().cache


def test_another_model_has_other_facts():
    subject, other = Subject.of(model()), Subject.of(model(windowed=(0, 1)))
    before = subject.decoder()
    subject.model = other.model
    assert subject.decoder() == other.decoder() != before


def test_a_rejected_model_is_unchanged_and_can_be_injected_again():
    subject = Subject.of(model())
    before = subject.model.graph.num_nodes()
    subject.decoder()
    with pytest.raises((UnsupportedError, UsageError)):
        Inject(past="input_ids", present="logits").apply(subject)
    assert subject.model.graph.num_nodes() == before
    assert len(subject.decoder().attentions) == 2
    Inject().apply(subject)
    assert len(subject.decoder().cache) == 4
