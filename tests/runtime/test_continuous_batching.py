"""Sequences of different lengths in one cache, each of which starts, ends and goes back by itself."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
from decoders import Config, Decoder
from exports import after, export
from laws import difference

from kvsurgeon import io
from kvsurgeon.errors import UsageError
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.passes.interface.add_query_lengths import AddQueryLengths
from kvsurgeon.passes.operators.fuse_attention import FuseAttention
from kvsurgeon.runtime import CachedDecoder, ContinuousBatch, TextGenerator, UncachedDecoder, open_session

LENGTHS = (3, 200, 17, 64, 5, 130, 9, 31)


@functools.cache
def original(**options: object) -> onnx.ModelProto:
    return Decoder(Config(**{"layers": 2, "head_dim": 16, "max_length": 256, **options})).model()


@functools.cache
def ragged(**options: object) -> onnx.ModelProto:
    return after(original(**options), Inject(cache="static", past_length="mask"), FuseAttention(padding="lengths"))


@functools.cache
def with_past_lengths(**options: object) -> onnx.ModelProto:
    """Return a model without fused attention that takes the past length of each sequence."""
    return after(original(**options), Inject(cache="static", past_length="per-sequence"))


@functools.cache
def with_fixed_rows(**options: object) -> onnx.ModelProto:
    """Return a model whose buffers have as many rows as it says, not as the host does."""
    return after(original(**options), Inject(cache="static", past_length="per-sequence", max_length=220))


def with_query_lengths(**options: object) -> onnx.ModelProto:
    return after(ragged(**options), AddQueryLengths())


def prompts() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 61, length).tolist() for length in LENGTHS]


@pytest.mark.parametrize("options", [{}, {"position_ids": True}])
@pytest.mark.parametrize("make", [ragged, with_past_lengths, with_fixed_rows])
def test_prompts_that_join_and_leave_give_the_tokens_of_each_alone(make, options):
    generator = TextGenerator(open_session(make(**options), threads=1), stop=(7, 19))
    alone = TextGenerator(open_session(original(**options), threads=1), stop=(7, 19))
    found: dict[int, list[int]] = {}
    for token in generator.stream_continuously(prompts(), rows=3, max_new_tokens=12):
        found.setdefault(token.row, []).append(token.id)
    expected = [alone.generate(prompt, max_new_tokens=12).tokens[0] for prompt in prompts()]
    assert [tuple(found[place]) for place in range(len(LENGTHS))] == list(expected)
    assert len({len(tokens) for tokens in expected}) > 1  # some end early


@pytest.mark.parametrize("make", [ragged, with_past_lengths])
def test_rejected_tokens_are_dropped_by_a_lower_length(make):
    """A draft of four tokens, of which two are rejected, next to a sequence that waits."""
    batch = ContinuousBatch(open_session(make(), threads=1), rows=2, capacity=64)
    reference = UncachedDecoder(open_session(original(), threads=1))
    text, other = prompts()[2], prompts()[4]
    waiting, _ = batch.start(other)
    number, _ = batch.start(text)
    batch.extend(number, [1, 2, 50, 51])
    batch.shorten(number, len(text) + 2)
    found = batch.step({number: 3, waiting: 4})
    for one, whole in ((number, [*text, 1, 2, 3]), (waiting, [*other, 4])):
        tokens = np.array([whole], np.int64)
        expected = reference.run(reference.inputs.feeds(tokens, np.ones_like(tokens)))[reference.logits][0, -1]
        assert difference(found[one], expected) < 1e-5


@pytest.mark.parametrize("options", [{}, {"position_ids": True}])
@pytest.mark.parametrize("make", [with_query_lengths, with_past_lengths])
def test_chunks_of_different_lengths_behind_pasts_of_different_lengths(make, options):
    """Every third sequence has one token, the others a part of their prompts."""
    batch = ContinuousBatch(open_session(make(**options), threads=1), rows=4, capacity=256)
    reference = UncachedDecoder(open_session(original(**options), threads=1))
    texts = {batch.start(text[:2])[0]: text for text in prompts()[:4]}
    done = dict.fromkeys(texts, 2)
    for size in (1, 40, 7, 120):
        parts = {
            number: text[done[number] :][: 1 if number % 3 == 2 else size] or [5] for number, text in texts.items()
        }
        found = batch.advance(parts)
        for number, part in parts.items():
            texts[number] = [*texts[number][: done[number]], *part, *texts[number][done[number] + len(part) :]]
            done[number] += len(part)
            tokens = np.array([texts[number][: done[number]]], np.int64)
            expected = reference.run(reference.inputs.feeds(tokens, np.ones_like(tokens)))[reference.logits][0]
            assert found[number].shape == expected[-len(part) :].shape
            assert difference(found[number], expected[-len(part) :]) < 1e-5
    assert done == batch.lengths


def test_a_model_without_query_lengths_takes_one_token_of_each_sequence():
    batch = ContinuousBatch(open_session(ragged(), threads=1), rows=2, capacity=64)
    numbers = [batch.start(text[:3])[0] for text in prompts()[:2]]
    with pytest.raises(UsageError, match="one token for each sequence, found 2; apply the pass add-query-lengths"):
        batch.advance({number: [1, 2] for number in numbers})
    with pytest.raises(UsageError, match="tokens for each of the sequences"):
        batch.advance({numbers[0]: [1]})


def test_the_padded_chunk_must_fit_into_every_row():
    batch = ContinuousBatch(open_session(after(ragged(), AddQueryLengths()), threads=1), rows=2, capacity=140)
    long, short = (batch.start(text)[0] for text in (prompts()[1][:138], prompts()[0]))
    with pytest.raises(UsageError, match="at most 140 tokens, the rows of the cache, found 238"):
        batch.advance({long: [1], short: prompts()[1][:100]})
    assert batch.lengths == {long: 138, short: 3}
    batch.end(long)
    batch.end(short)
    with pytest.raises(UsageError, match="tokens for each of the sequences"):
        batch.step({})


def test_a_batch_with_query_lengths_takes_chunks_in_the_verifier_too():
    model = after(ragged(), AddQueryLengths())
    assert [given.name for given in model.graph.input][-1] == "query_lengths"
    assert verify(original(), model, threads=1).verdict == "same"


@pytest.mark.parametrize("past_length", ["input", "mask"])
def test_one_length_for_all_sequences_can_be_lowered_too(past_length):
    decoder = CachedDecoder(open_session(after(original(), Inject(cache="static", past_length=past_length)), threads=1))
    reference = UncachedDecoder(open_session(original(), threads=1))
    text = np.array(prompts()[2:3], np.int64)
    drafted, accepted = (np.append(text, [more], axis=1) for more in ([1, 2, 50, 51], [1, 2, 3]))
    decoder.prefill(decoder.inputs.feeds(drafted, np.ones_like(drafted)))
    decoder.past_length = text.shape[1] + 2
    feeds = decoder.inputs.feeds(accepted, np.ones_like(accepted))
    found = decoder.step(decoder.inputs.part(feeds, decoder.past_length, accepted.shape[1]))
    expected = reference.run(reference.inputs.feeds(accepted, np.ones_like(accepted)))[reference.logits]
    assert difference(found[0, -1], expected[0, -1]) < 1e-5


def test_a_rotation_that_stays_in_the_graph_has_one_position_for_all():
    subject = Subject.of(original(head_dim=8))  # for which the operator has no rotation
    Inject(cache="static", past_length="mask").apply(subject)
    subject.changed()
    outcome = FuseAttention(padding="lengths").apply(subject)
    assert isinstance(outcome, Changed)
    assert any("must have as many tokens" in note for note in outcome.notes)
    with pytest.raises(UsageError, match="different lengths"):
        ContinuousBatch(open_session(io.to_proto(subject.model)), rows=2, capacity=8)


@pytest.mark.parametrize("passes", [(Inject(),), (Inject(cache="static"), FuseAttention(max_length=64))])
def test_masks_that_may_hide_any_token_do_not_give_lengths(passes):
    with pytest.raises(UsageError, match="different lengths"):
        ContinuousBatch(open_session(after(export("decoder"), *passes)), rows=2, capacity=8)


def test_limits():
    batch = ContinuousBatch(open_session(ragged(), threads=1), rows=1, capacity=8)
    with pytest.raises(UsageError, match="at most 8 tokens"):
        batch.start([1] * 9)
    assert not batch.lengths
    number, _ = batch.start([1, 2, 3])
    for call in (
        lambda: batch.start([1]),
        lambda: batch.extend(number, [1] * 6),
        lambda: batch.shorten(number, 4),
        lambda: batch.step({}),
    ):
        with pytest.raises(UsageError, match="expected"):
            call()
    batch.end(number)
    assert not batch.lengths
