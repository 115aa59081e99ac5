"""Hosts keep a cache in its cache mode, so that the judge and `generate` can run any of them."""

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
from kvsurgeon.runtime import CachedDecoder, Writer, open_session, read_cache_metadata
from kvsurgeon.runtime.cache_managers import SPARE, DynamicCacheManager, NewTokensCacheManager, StaticCacheManager
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

MAX = 32
CACHE_MODES = {
    "dynamic": {},
    "static": {"cache": "static"},
    "room": {"cache": "static", "max_length": MAX},
    "cut short": {"cache": "static", "past_length": "mask"},
    "transposed": {"cache": "static", "key_layout": ("kv_heads", "batch", "head_dim", "sequence")},
    "new-tokens": {"cache": "new-tokens"},
    "unfilled": {"cache": "new-tokens", "past_length": "input"},
}
HOSTS = {
    **dict.fromkeys(CACHE_MODES, StaticCacheManager),
    "dynamic": DynamicCacheManager,
    "new-tokens": NewTokensCacheManager,
    "unfilled": NewTokensCacheManager,
}
OPENED = "inject,retarget{cache=new-tokens,past-length=input}"
SHORT = TextLengths(short=9, long=20, batch=2)


@functools.cache
def model(cache: str, name: str = "llama_dynamo_sdpa") -> onnx.ModelProto:
    return injected(export(name), **CACHE_MODES[cache])


def decoder(cache: str) -> CachedDecoder:
    return CachedDecoder(open_session(model(cache), threads=1))


@pytest.mark.parametrize(("cache", "host"), HOSTS.items())
def test_the_host_is_told_by_dims_and_notes(cache, host):
    assert type(decoder(cache).host) is host


@pytest.mark.parametrize("cache", CACHE_MODES)
@pytest.mark.parametrize("name", ["llama_dynamo_sdpa", "decoder"])
def test_the_judge_finds_every_cache_mode_the_same(cache, name):
    report = verify(export(name), model(cache, name), lengths=SHORT, threads=1)
    assert (report.verdict, report.problems) == ("same", ())
    assert "left padding" in {trial.scenario for trial in report.trials}


@pytest.mark.parametrize("cache", CACHE_MODES)
def test_the_same_tokens_are_generated(cache):
    expected = Writer(export("llama_dynamo_sdpa"), threads=1).generate([[3, 1, 4], [1, 5]], max_new_tokens=6)
    found = Writer(model(cache), threads=1).generate([[3, 1, 4], [1, 5]], max_new_tokens=6)
    assert (found.cached, found.tokens) == (True, expected.tokens)


def wrong(cache: str, operator: str) -> onnx.ModelProto:
    """Writes its rows one place too early."""
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


def test_rows_written_elsewhere_are_found_out():
    report = verify(export("llama_dynamo_sdpa"), wrong("static", "ScatterElements"), lengths=SHORT, threads=1)
    assert report.verdict == "different"


def test_past_and_present_are_one_memory():
    one = decoder("static")
    feeds = one.inputs.whole(np.array([[1, 2, 3]]), np.ones((1, 3), np.int64))
    one.prefill(feeds)
    before = one.host.given(1, 3, 1)
    assert {name: value.data_ptr() for name, value in before.items()} == {
        entry.past.name: one.host.into[entry.present].data_ptr() for entry in one.cache
    }


def test_a_buffer_grows_and_keeps_its_rows():
    one = decoder("static")
    tokens = np.arange(150)[None] % 7
    feeds = one.inputs.whole(tokens, np.ones_like(tokens))
    one.prefill(one.inputs.part(feeds, 0, 60))
    kept = [one.remembered(entry) for entry in one.cache]
    one.step(one.inputs.part(feeds, 60, 150))
    assert all(np.array_equal(rows, one.remembered(e)[:, :, :60]) for rows, e in zip(kept, one.cache, strict=True))
    assert one.remembered(one.cache[0]).shape[2] == one.past_length == 150


def test_a_full_buffer_takes_no_more():
    one = decoder("room")
    tokens = np.arange(MAX + 1)[None] % 7
    feeds = one.inputs.whole(tokens, np.ones_like(tokens))
    one.prefill(one.inputs.part(feeds, 0, MAX))
    with pytest.raises(RunError, match="expected at most 32 tokens, as many as the cache has rows for, found 33"):
        one.step(one.inputs.part(feeds, MAX, MAX + 1))


def test_no_more_rows_are_left_unfilled_than_a_text_leaves_room_for():
    """A text as long as the export: a table of so many rows has none for those that hold nothing."""
    config = Config(layers=1, windowed=(), static=(1, 6), max_length=6)
    done = run_and_save(Decoder(config).model(), Pipeline.parse(OPENED))
    assert (done.verification.verdict, done.verification.problems) == ("same", ())
    one = CachedDecoder(open_session(io.to_proto(done.model), threads=1))
    assert one.room == 6
    unfilled = {(past, new): one.host.margins(past, past + new, new)[0] for past, new in [(0, 1), (2, 2), (3, 3)]}
    assert unfilled == {(0, 1): SPARE, (2, 2): 2, (3, 3): 0}


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', '{"key_layout": 3}', "null"])
def test_a_note_that_cannot_be_read_notes_nothing(text):
    note = read_cache_metadata({"kvsurgeon.cache": text})
    assert (note.cache_mode, dict(note.layouts)) == (None, {})
