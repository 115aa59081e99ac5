"""The public names of the package."""

import subprocess
import sys

import onnx
import pytest
from decoders import Config, Decoder

import kvsurgeon
from kvsurgeon.errors import UsageError


@pytest.mark.parametrize("name", kvsurgeon.__all__)
def test_every_public_name_has_a_docstring(name):
    assert getattr(kvsurgeon, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'kvsurgeon' has no attribute 'nothing'"):
        _ = kvsurgeon.nothing
    assert dir(kvsurgeon) == sorted(kvsurgeon.__all__)


def test_the_import_loads_no_heavy_module():
    code = "import sys, kvsurgeon; print([name for name in ('onnx', 'numpy', 'typer') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_find_attention_does_not_change_the_model():
    model = Decoder(Config()).model()
    before = model.SerializeToString()
    layers = kvsurgeon.find_attention(model)
    assert [(one.query_heads, one.kv_heads, one.head_dim, one.mask.kind) for one in layers] == [
        (4, 2, 8, "causal"),
        (4, 2, 8, "sliding-window"),
        (4, 2, 8, "causal"),
    ]
    assert model.SerializeToString() == before


def test_inject_takes_options_and_does_not_change_a_proto(tmp_path):
    model = Decoder(Config()).model()
    before = model.SerializeToString()
    run = kvsurgeon.inject(model, tmp_path / "out", present="kept.{layer}.{kind}")
    assert run.verification.ok
    assert "kept.0.key" in [value.name for value in onnx.load(run.path).graph.output]
    assert model.SerializeToString() == before
    with pytest.raises((TypeError, UsageError)):
        kvsurgeon.inject(model, color="red")
