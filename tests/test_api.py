"""The names that people import."""

import subprocess
import sys

import onnx
import pytest
from decoders import Config, Decoder

import kvsurgeon
from kvsurgeon.errors import UsageError


@pytest.mark.parametrize("name", kvsurgeon.__all__)
def test_every_name_is_there_and_documented(name):
    assert getattr(kvsurgeon, name).__doc__


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'kvsurgeon' has no attribute 'nothing'"):
        _ = kvsurgeon.nothing
    assert dir(kvsurgeon) == sorted(kvsurgeon.__all__)


def test_the_import_alone_is_light():
    code = "import sys, kvsurgeon; print([name for name in ('onnx', 'numpy', 'typer') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_attention_can_be_found_by_anyone_and_the_model_stays_as_it_is():
    model = Decoder(Config()).model()
    before = model.SerializeToString()
    layers = kvsurgeon.find_attention(model)
    assert [(one.query_heads, one.kv_heads, one.head_dim, one.mask.kind) for one in layers] == [
        (4, 2, 8, "causal"),
        (4, 2, 8, "sliding-window"),
        (4, 2, 8, "causal"),
    ]
    assert model.SerializeToString() == before


def test_inject_takes_options_and_leaves_a_proto_as_it_is(tmp_path):
    model = Decoder(Config()).model()
    before = model.SerializeToString()
    surgery = kvsurgeon.inject(model, tmp_path / "out", present="kept.{layer}.{kind}")
    assert surgery.report.ok
    assert "kept.0.key" in [value.name for value in onnx.load(surgery.path).graph.output]
    assert model.SerializeToString() == before
    with pytest.raises((TypeError, UsageError)):
        kvsurgeon.inject(model, colour="red")
