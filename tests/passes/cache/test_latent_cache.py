"""Attention reads the latent of multi-head latent attention, and the cache holds nothing else."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
from decoders import Config, Decoder
from exports import after, export

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.latent_cache import LatentCache
from kvsurgeon.passes.contract import CACHE_TOKENS, Subject, Unchanged
from kvsurgeon.passes.operators.fuse_attention import FuseAttention
from kvsurgeon.passes.opset.raise_opset import RaiseOpset
from kvsurgeon.runtime import CachedDecoder, open_session
from kvsurgeon.workflow.pipeline import Pipeline

CONFIG = Config(layers=2, windowed=(1,), kv_heads=4)
LATENT = 10  # features of the latent
FUSED = FuseAttention(operator="attention")


class WithLatent(Decoder):
    """A decoder with multi-head latent attention; its methods are the places where variants differ."""

    def attention(self, layer: int, hidden: str) -> str:
        config, graph = self.config, self.graph
        width = config.heads * config.head_dim
        plain, rotated = (self.heads(hidden, name, config.heads) for name in ("query_plain", "query"))
        query = graph.op("Concat", plain, self.rotate(layer, rotated), axis=-1)
        latent = self.latent(layer, graph.op("MatMul", hidden, self.weight("latent_down", config.hidden, LATENT)))
        both = self.up(layer, graph.op("MatMul", latent, self.weight("latent_up", LATENT, 2 * width, gain=2.0)))
        both = graph.op("Reshape", both, graph.constant([0, 0, config.heads, 2 * config.head_dim]))
        key, value = graph.split(graph.op("Transpose", both, perm=[0, 2, 1, 3]), 2, axis=-1)
        shared = self.rotate(layer, self.heads(hidden, "shared", 1, gain=2.0))
        shared = graph.op("Expand", shared, graph.constant([1, config.heads, 1, 1]))
        key = graph.op("Concat", self.key(layer, key), shared, axis=-1)
        scores = graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 1, 3, 2]))
        scores = graph.op("Mul", scores, self.scale(layer))
        bias = graph.op("Where", self.visible(layer), self.number(0.0), self.number(-1e4))
        weights = graph.op("Softmax", graph.op("Add", scores, bias), axis=-1)
        context = graph.op("Transpose", graph.op("MatMul", weights, value), perm=[0, 2, 1, 3])
        merged = graph.op("Reshape", context, graph.constant([0, 0, width]))
        return graph.op("MatMul", merged, self.weight("out", width, config.hidden))

    def latent(self, layer: int, latent: str) -> str:
        return self.norm_of(latent)

    def norm_of(self, latent: str) -> str:
        mean = self.graph.op("ReduceMean", self.graph.op("Mul", latent, latent), self.graph.constant([-1]))
        return self.graph.op("Div", latent, self.graph.op("Sqrt", self.graph.op("Add", mean, self.number(1e-5))))

    def up(self, layer: int, both: str) -> str:
        return both

    def key(self, layer: int, key: str) -> str:
        return key


class WithBias(WithLatent):
    def up(self, layer: int, both: str) -> str:
        bias = np.linspace(-1, 1, 2 * self.config.heads * self.config.head_dim)
        return self.graph.op("Add", both, self.graph.constant(bias, "float32"))


class WithRotatedKeys(WithLatent):
    def key(self, layer: int, key: str) -> str:
        return self.rotate(layer, key)


class WithNonlinearKeys(WithLatent):
    def key(self, layer: int, key: str) -> str:
        return self.graph.op("Tanh", key)


class WithMixedTokens(WithLatent):
    """Each key is also that of the token before it."""

    def key(self, layer: int, key: str) -> str:
        first, rest = self.graph.constant([0]), self.graph.constant([-1])
        axis = self.graph.constant([2])
        before = self.graph.op("Slice", key, first, rest, axis)
        padded = self.graph.op("Pad", before, self.graph.constant([0, 0, 1, 0, 0, 0, 0, 0]))
        return self.graph.op("Add", key, padded)


@functools.cache
def original(**options: object) -> onnx.ModelProto:
    return WithLatent(Config(**{"layers": 2, "windowed": (1,), "kv_heads": 4, **options})).model()


@functools.cache
def with_latents() -> onnx.ModelProto:
    return after(original(), LatentCache(), Inject())


def test_results_are_the_same_and_the_cache_holds_the_latent():
    report = verify(original(), with_latents(), effort="quick", seed=3)
    assert report.verdict == "same", report.problems
    assert report.error < 1e-5
    decoder = CachedDecoder(open_session(with_latents(), threads=1))
    tokens = np.arange(11)[None]
    decoder.run(decoder.inputs.feeds(tokens, np.ones_like(tokens)))
    assert [decoder.cached_rows(entry).shape for entry in decoder.cache] == [(1, 1, 11, LATENT + 8)] * 2


def test_bytes_and_work_are_stated():
    run = Pipeline.parse("latent-cache").run(original())
    assert run.cache_bytes == (CACHE_TOKENS * 2 * 4 * (16 + 8) * 4, CACHE_TOKENS * 2 * 18 * 4)
    (note,) = run.notes
    assert note.startswith("a token has 144 bytes instead of 768")
    assert note.endswith("a decode step multiplies 144 numbers instead of 96 for it in a layer")


def test_a_cache_of_heads_is_replaced():
    model = after(original(), Inject(past="k{layer}_{kind}", present="new{layer}_{kind}"), LatentCache())
    assert [value.name for value in model.graph.input][-2:] == ["k0_key", "k1_key"]
    assert verify(original(), model, effort="quick", seed=3).verdict == "same"


def test_float16():
    model = original(dtype="float16")
    assert verify(model, after(model, LatentCache(), Inject()), effort="quick", seed=3).verdict == "same"


@pytest.mark.parametrize("size", [(1, 8), (2, 33)])
def test_an_export_of_a_fixed_length(size):
    model = original(static=size)
    assert verify(model, after(model, LatentCache(), Inject()), effort="quick", seed=3).verdict == "same"


def test_a_static_cache_and_integers():
    run = Pipeline.parse("latent-cache,inject{cache=static,max-length=64},quantize-cache").run(original())
    assert {value.dtype.name for value in run.model.graph.inputs if value.name.endswith("key")} == {"INT8"}


def test_a_second_run_changes_nothing():
    assert isinstance(LatentCache().apply(Subject.of(after(original(), LatentCache()))), Unchanged)


@pytest.mark.parametrize("variant", [WithRotatedKeys, WithNonlinearKeys])
def test_keys_that_are_no_map_of_the_latent_are_unchanged(variant):
    outcome = LatentCache().apply(Subject.of(variant(CONFIG).model()))
    assert outcome == Unchanged(reason="no layer computes keys and values from fewer features")


@pytest.mark.parametrize("name", ["llama_dynamo_eager", "neox_torchscript_eager"])
def test_keys_with_a_rotary_embedding_are_unchanged(name):
    assert isinstance(LatentCache().apply(Subject.of(export(name))), Unchanged)


def test_a_bias_is_rejected():
    with pytest.raises(UnsupportedError, match=r"linear map of the [0-9]+ features of .*, without a bias"):
        LatentCache().apply(Subject.of(WithBias(CONFIG).model()))


def test_keys_of_several_tokens_are_not_taken_for_a_map_of_one():
    model = WithMixedTokens(CONFIG).model()
    try:
        outcome = LatentCache().apply(Subject.of(model))
    except UnsupportedError:
        return
    assert isinstance(outcome, Unchanged)


def test_wrong_maps_are_found():
    wrong = onnx.ModelProto.FromString(with_latents().SerializeToString())
    weights = next(one for one in wrong.graph.initializer if list(one.dims) == [4, 18, 8])
    array = onnx.numpy_helper.to_array(weights).copy()
    array[0, 0] += 0.5
    weights.CopyFrom(onnx.numpy_helper.from_array(array, weights.name))
    assert verify(original(), wrong, effort="quick", seed=3).verdict == "different"


def test_weights_in_a_file_are_read(tmp_path):
    copy = onnx.ModelProto.FromString(original().SerializeToString())
    onnx.save(copy, tmp_path / "model.onnx", save_as_external_data=True, location="data", size_threshold=256)
    run = Pipeline.parse("latent-cache,inject").run(tmp_path / "model.onnx")
    report = verify(original(), io.to_proto(run.model, tmp_path), folder=tmp_path, effort="quick", seed=3)
    assert report.verdict == "same", report.problems


def test_attention_as_one_operator_is_written_in_others():
    fused = after(WithLatent(Config(layers=1, windowed=(), kv_heads=4)).model(), RaiseOpset(opset=23), FUSED)
    assert any(node.op_type == "Attention" for node in fused.graph.node)
    assert verify(fused, after(fused, LatentCache(), Inject()), effort="quick", seed=3).verdict == "same"
