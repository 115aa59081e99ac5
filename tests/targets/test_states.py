"""States of a fixed size in the form of each target: names, shapes, side files, and what no target keeps."""

import json
from dataclasses import replace

import onnx
import pytest
from attentions import attention
from exports import injected
from laws import assert_law, dims_of, texts
from model_infos import model_info
from recurrences import CONVOLUTION
from written import read

from kvsurgeon import io
from kvsurgeon.passes.cache.retarget import Retarget
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.interface.name_states import NameStates
from kvsurgeon.targets.compatibility import find_incompatibilities
from kvsurgeon.targets.genai import GENAI, genai_config
from kvsurgeon.targets.model_info import CachePairInfo, ModelInfo, TensorInfo
from kvsurgeon.targets.openvino import OPENVINO
from kvsurgeon.targets.optimum import OPTIMUM
from kvsurgeon.targets.transformers_js import TRANSFORMERS_JS, transformers_js_config
from kvsurgeon.workflow import verification

CONV, RECURRENT = ("batch_size", 16, 3), ("batch_size", 4, 8, 16)


def convolution() -> onnx.ModelProto:
    return read(attention(hidden=CONVOLUTION, constants="float[8, 1, 3] kernel"))


def with_states(*, conv: int = 1, recurrent: int = 1, layers: int = 1, **config: object) -> ModelInfo:
    """Return a model with so many states of each kind, numbered after its attention layers."""
    states = []
    for kind, count, dims in (("conv", conv, CONV), ("recurrent", recurrent, RECURRENT)):
        for layer in range(layers, layers + count):
            past, present = (TensorInfo(name=f"{one}.{layer}.{kind}", dtype="float32", dims=dims)
                             for one in ("past", "present"))  # fmt: skip
            states.append(CachePairInfo(layer=layer, kind=f"{kind}_state", past=past, present=present))
    return replace(model_info(dict(config), layers=layers), states=tuple(states))


def blocking(target, model):
    return [str(one) for one in find_incompatibilities(target, model) if one.blocking]


@pytest.mark.parametrize(
    ("options", "name"), [({"after_attention": True}, "past.1.conv"), ({"conv": "past_conv.{layer}"}, "past_conv.0")]
)
def test_a_conv_state_has_the_name_and_shape_of_a_runtime(options, name):
    subject = Subject.of(injected(convolution()))
    assert isinstance(NameStates(**options).apply(subject), Changed)
    model = io.to_proto(subject.model)
    onnx.checker.check_model(model)
    assert {value.name: dims_of(value) for value in model.graph.input}[name] == ["batch_size", 8, 2]
    assert model.graph.output[-1].name == name.replace("past", "present")
    assert_law(convolution(), model, whole=texts(convolution(), length=9), cuts=[1, 4, 5])
    assert verification.verify_models(convolution(), model, effort="quick").verdict == "same"


def test_named_states_are_renamed_and_replaced():
    subject = Subject.of(injected(convolution()))
    for options in ({}, {"conv": "past_conv.{layer}"}):
        assert isinstance(NameStates(**options).apply(subject), Changed)
    assert [value.name for value in subject.model.graph.inputs][-1] == "past_conv.0"
    Retarget(cache="static").apply(subject)
    assert verification.verify_models(convolution(), io.to_proto(subject.model), effort="quick").verdict == "same"


def test_a_model_without_states_is_unchanged():
    assert isinstance(NameStates().apply(Subject.of(injected(read(attention())))), Unchanged)


def test_genai_numbers_states_after_attention():
    decoder = genai_config(with_states(conv=2, recurrent=2))["model"]["decoder"]
    assert decoder["num_hidden_layers"] == 3
    assert decoder["inputs"]["past_conv_names"] == "past.%d.conv"
    assert decoder["outputs"]["present_recurrent_names"] == "present.%d.recurrent"
    assert "layer_types" not in decoder


def test_genai_has_a_type_for_conv_states_alone():
    model = genai_config(with_states(conv=2, recurrent=0, layers=2))["model"]
    assert model["type"] == "lfm2"
    assert model["decoder"]["layer_types"] == ["full_attention", "full_attention", "conv", "conv"]
    assert (model["decoder"]["num_hidden_layers"], model["decoder"]["conv_cache_size"]) == (4, 3)


@pytest.mark.parametrize(
    ("target", "model", "reason"),
    [
        (GENAI, with_states(conv=3, recurrent=1), "a conv_state of each recurrent_state"),
        (GENAI, with_states(conv=0), "a conv_state of each recurrent_state"),
        (OPTIMUM, with_states(), "expected no conv_state, which optimum does not keep"),
        (TRANSFORMERS_JS, replace(with_states(), cache=()), "expected attention"),
    ],
)
def test_states_that_a_target_does_not_keep(target, model, reason):
    assert any(reason in one for one in blocking(target, model))


def test_genai_warns_of_padding():
    found = [str(one) for one in find_incompatibilities(GENAI, with_states()) if not one.blocking]
    assert any("enters a state" in one for one in found)


@pytest.mark.parametrize("target", [GENAI, TRANSFORMERS_JS, OPENVINO])
def test_targets_keep_states(target):
    assert not blocking(target, with_states())


@pytest.mark.parametrize("operator", ["LinearAttention", "CausalConvWithState"])
def test_openvino_has_no_operators_of_states(operator):
    model = replace(with_states(), operators={("com.microsoft", operator): "y"})
    assert [one for one in blocking(OPENVINO, model) if f"openvino has no operator com.microsoft.{operator}" in one]


def test_transformers_js_finds_every_state():
    config = transformers_js_config(
        with_states(conv=3, layers=2, model_type="granite", num_hidden_layers=9, layer_types=["mamba"] * 9)
    )
    assert (config["model_type"], config["num_hidden_layers"]) == ("falcon_h1", 5)
    assert "layer_types" not in config


def test_a_config_for_browsers_has_no_infinity():
    config = transformers_js_config(with_states(time_step_limit=[0.0, float("inf")], hidden_size=8))
    assert json.loads(json.dumps(config, allow_nan=False))["hidden_size"] == 8
