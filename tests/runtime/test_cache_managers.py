"""Cache managers run models of each cache mode."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
from decoders import Config, Decoder
from exports import export, injected

from kvsurgeon import io
from kvsurgeon.errors import RunError
from kvsurgeon.parity import TextLengths, verify
from kvsurgeon.runtime import CachedDecoder, TextGenerator, open_session
from kvsurgeon.runtime.cache_managers import (
    UNFILLED_ROWS,
    CacheManager,
    NewTokensCacheManager,
    StaticCacheManager,
    read_cache_metadata,
)
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

MAX = 32
CACHE_MODES = {
    "dynamic": {},
    "static": {"cache": "static"},
    "bounded": {"cache": "static", "max_length": MAX},
    "length from mask": {"cache": "static", "past_length": "mask"},
    "transposed": {"cache": "static", "key_layout": ("kv_heads", "batch", "head_dim", "sequence")},
    "new-tokens": {"cache": "new-tokens"},
    "unfilled": {"cache": "new-tokens", "past_length": "input"},
}
MANAGERS = {
    **dict.fromkeys(CACHE_MODES, StaticCacheManager),
    "dynamic": CacheManager,
    "new-tokens": NewTokensCacheManager,
    "unfilled": NewTokensCacheManager,
}
NEW_TOKENS = "inject,retarget{cache=new-tokens,past-length=input}"
SHORT = TextLengths(short=9, long=20, batch=2)


@functools.cache
def model(cache: str, name: str = "llama_dynamo_sdpa") -> onnx.ModelProto:
    return injected(export(name), **CACHE_MODES[cache])


def decoder(cache: str) -> CachedDecoder:
    return CachedDecoder(open_session(model(cache), threads=1))


@pytest.mark.parametrize(("cache", "manager"), MANAGERS.items())
def test_dims_and_metadata_give_the_mode(cache, manager):
    assert type(decoder(cache).cache_manager) is manager


@pytest.mark.parametrize("cache", CACHE_MODES)
@pytest.mark.parametrize("name", ["llama_dynamo_sdpa", "decoder"])
def test_verifies_each_mode(cache, name):
    report = verify(export(name), model(cache, name), lengths=SHORT, threads=1)
    assert (report.verdict, report.problems) == ("same", ())
    assert "left padding" in {one.scenario for one in report.comparisons}


@pytest.mark.parametrize("cache", CACHE_MODES)
def test_generates_the_same_tokens(cache):
    expected = TextGenerator(export("llama_dynamo_sdpa"), threads=1).generate([[3, 1, 4], [1, 5]], max_new_tokens=6)
    found = TextGenerator(model(cache), threads=1).generate([[3, 1, 4], [1, 5]], max_new_tokens=6)
    assert (found.cached, found.tokens) == (True, expected.tokens)


def wrong(cache: str, operator: str) -> onnx.ModelProto:
    """Return a model that writes its rows one index too early."""
    broken = onnx.ModelProto()
    broken.CopyFrom(model(cache))
    node = next(node for node in broken.graph.node if node.op_type == operator)
    early = onnx.helper.make_node("Sub", [node.input[1], "one"], ["early"])
    broken.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.int64), "one"))
    for other in broken.graph.node:
        if other.op_type == operator:
            other.input[1] = "early"
    nodes = list(broken.graph.node)
    place = nodes.index(node)
    del broken.graph.node[:]
    broken.graph.node.extend([*nodes[:place], early, *nodes[place:]])
    return broken


def test_finds_rows_written_to_a_wrong_index():
    report = verify(export("llama_dynamo_sdpa"), wrong("static", "ScatterElements"), lengths=SHORT, threads=1)
    assert report.verdict == "different"


def test_past_and_present_share_a_buffer():
    one = decoder("static")
    feeds = one.inputs.feeds(np.array([[1, 2, 3]]), np.ones((1, 3), np.int64))
    one.prefill(feeds)
    before = one.cache_manager.pasts(1, 3, 1)
    assert {name: value.data_ptr() for name, value in before.items()} == {
        entry.past.name: one.cache_manager.bound_outputs[entry.present].data_ptr() for entry in one.cache
    }


def test_enlarges_a_buffer_and_keeps_its_rows():
    one = decoder("static")
    tokens = np.arange(150)[None] % 7
    feeds = one.inputs.feeds(tokens, np.ones_like(tokens))
    one.prefill(one.inputs.part(feeds, 0, 60))
    kept = [one.cached_rows(entry) for entry in one.cache]
    one.step(one.inputs.part(feeds, 60, 150))
    assert all(np.array_equal(rows, one.cached_rows(e)[:, :, :60]) for rows, e in zip(kept, one.cache, strict=True))
    assert one.cached_rows(one.cache[0]).shape[2] == one.past_length == 150


def test_rejects_more_tokens_than_the_buffer_has_rows():
    one = decoder("bounded")
    tokens = np.arange(MAX + 1)[None] % 7
    feeds = one.inputs.feeds(tokens, np.ones_like(tokens))
    one.prefill(one.inputs.part(feeds, 0, MAX))
    with pytest.raises(RunError, match="expected at most 32 tokens, the rows of the cache, found 33"):
        one.step(one.inputs.part(feeds, MAX, MAX + 1))


def test_leaves_no_more_rows_unfilled_than_the_model_allows():
    """A position table of as many rows as the text has tokens has none for unfilled rows."""
    config = Config(layers=1, windowed=(), static=(1, 6), max_length=6)
    done = run_and_save(Decoder(config).model(), Pipeline.parse(NEW_TOKENS))
    assert (done.verification.verdict, done.verification.problems) == ("same", ())
    one = CachedDecoder(open_session(io.to_proto(done.model), threads=1))
    assert one.max_length == 6
    unfilled = {
        (past, new): one.cache_manager.mask_padding(past, past + new, new)[0] for past, new in [(0, 1), (2, 2), (3, 3)]
    }
    assert unfilled == {(0, 1): UNFILLED_ROWS, (2, 2): 2, (3, 3): 0}


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', '{"key_layout": 3}', "null"])
def test_ignores_unreadable_metadata(text):
    declared = read_cache_metadata({"kvsurgeon.cache": text})
    assert (declared.cache_mode, dict(declared.layouts)) == (None, {})
