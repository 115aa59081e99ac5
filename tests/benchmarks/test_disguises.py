"""However a model is written down, the surgeon makes the same of it; and what is written down is the same model."""

from random import Random

import numpy as np
import onnx
import pytest
from exports import FILES, ONE_OF_EACH, export, injected
from laws import assert_law, in_onnxruntime, texts
from mutating import disguises

ALONE = [*disguises.WRITTEN, disguises.optimised_by_onnxruntime]


def disguised(name: str, disguise: disguises.Disguise, seed: int = 0) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(export(name))
    return disguise(copy, Random(seed))


def assert_the_same(name: str, model: onnx.ModelProto) -> None:
    """As many tensors are remembered as of the plain model, and the cache keeps the law."""
    original, cached = export(name), injected(model)
    assert len(cached.graph.input) - len(model.graph.input) == 2 * 2  # layers, keys and values
    assert_law(original, disguises.with_interface_of(cached, original))


@pytest.mark.parametrize("disguise", ALONE, ids=lambda disguise: disguise.__name__)
@pytest.mark.parametrize("name", ["llama_dynamo_sdpa", "gpt2_torchscript_eager"])
def test_one_disguise(name, disguise):
    assert_the_same(name, disguised(name, disguise))


@pytest.mark.parametrize("name", FILES)
def test_all_disguises_at_once(name):
    assert_the_same(name, disguised(name, disguises.everything, seed=len(name)))


@pytest.mark.parametrize("disguise", [*ALONE, disguises.everything], ids=lambda disguise: disguise.__name__)
def test_a_disguise_changes_the_text_and_not_the_model(disguise):
    changed = []
    for name in ONE_OF_EACH:
        original, other = export(name), disguised(name, disguise)
        changed.append(other.graph != original.graph)
        onnx.checker.check_model(other)
        feeds = texts(original)
        found = in_onnxruntime(disguises.with_interface_of(other, original))(feeds)
        np.testing.assert_allclose(found["logits"], in_onnxruntime(original)(feeds)["logits"], atol=1e-4)
    assert sum(changed) >= 2


def test_noise_hides_every_name():
    name = "llama_torchscript_eager"
    original, other = export(name), disguised(name, disguises.renamed)
    names = [{value for node in model.graph.node for value in (node.name, *node.input, *node.output) if value}
             for model in (original, other)]  # fmt: skip
    assert not names[0] & names[1]
    assert not {value.name for value in original.graph.input} & {value.name for value in other.graph.input}
