"""Injection gives the same result for equivalent rewrites, and each rewrite computes the same."""

from random import Random

import numpy as np
import onnx
import pytest
from exports import FILES, ONE_OF_EACH, export, injected
from laws import assert_law, in_onnxruntime, texts
from mutating import rewrites

ALONE = [*rewrites.WRITTEN, rewrites.optimized_by_onnxruntime]


def rewritten(name: str, rewrite: rewrites.Rewrite, seed: int = 0) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(export(name))
    return rewrite(copy, Random(seed))


def assert_the_same(name: str, model: onnx.ModelProto) -> None:
    """Assert that as many tensors are cached as in the original, and that the cache is correct."""
    original, cached = export(name), injected(model)
    assert len(cached.graph.input) - len(model.graph.input) == 2 * 2  # layers, keys and values
    assert_law(original, rewrites.with_interface_of(cached, original))


@pytest.mark.parametrize("rewrite", ALONE, ids=lambda rewrite: rewrite.__name__)
@pytest.mark.parametrize("name", ["llama_dynamo_sdpa", "gpt2_torchscript_eager"])
def test_one_rewrite(name, rewrite):
    assert_the_same(name, rewritten(name, rewrite))


@pytest.mark.parametrize("name", FILES)
def test_all_rewrites_at_once(name):
    assert_the_same(name, rewritten(name, rewrites.everything, seed=len(name)))


@pytest.mark.parametrize("rewrite", [*ALONE, rewrites.everything], ids=lambda rewrite: rewrite.__name__)
def test_a_rewrite_changes_the_text_and_not_the_model(rewrite):
    changed = []
    for name in ONE_OF_EACH:
        original, other = export(name), rewritten(name, rewrite)
        changed.append(other.graph != original.graph)
        onnx.checker.check_model(other)
        feeds = texts(original)
        found = in_onnxruntime(rewrites.with_interface_of(other, original))(feeds)
        np.testing.assert_allclose(found["logits"], in_onnxruntime(original)(feeds)["logits"], atol=1e-4)
    assert sum(changed) >= 2


def test_noise_hides_every_name():
    name = "llama_torchscript_eager"
    original, other = export(name), rewritten(name, rewrites.renamed)
    names = [{value for node in model.graph.node for value in (node.name, *node.input, *node.output) if value}
             for model in (original, other)]  # fmt: skip
    assert not names[0] & names[1]
    assert not {value.name for value in original.graph.input} & {value.name for value in other.graph.input}
