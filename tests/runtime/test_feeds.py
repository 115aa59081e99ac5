"""What a model is given follows from its dims, then its names, then their order."""

import numpy as np
import pytest

from kvsurgeon.errors import UsageError
from kvsurgeon.runtime import (
    Tensor,
    axes_of,
    cache_entries,
    cache_mismatch,
    find_cache,
    fixed_size,
    inputs_of,
    logits_name,
    may_be_past,
)
from kvsurgeon.runtime.axes import empty_shape

PAST = "past_sequence_length"
MASK = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
TOKENS = np.array([[5, 5, 6, 7], [1, 2, 3, 4]])


def tensor(name, *dims, dtype="int64"):
    return Tensor(name=name, dtype=np.dtype(dtype), dims=dims)


def past(name="past_key_values.0.key", *dims):
    return tensor(name, *(dims or ("batch_size", 2, PAST, 8)), dtype="float32")


def kinds(*tensors):
    return {given.name: given.kind for given in inputs_of(tensors).given}


def test_the_names_of_an_exporter_are_known():
    given = [
        tensor(name, "batch", "sequence") for name in ("attention_mask", "token_type_ids", "position_ids", "input_ids")
    ]

    assert kinds(*given) == {
        "attention_mask": "mask",
        "token_type_ids": "types",
        "position_ids": "positions",
        "input_ids": "tokens",
    }


def test_dims_tell_what_noise_names_do_not():
    noise = [
        tensor("input.1", "batch_size", "sequence_length"),
        tensor("onnx::Cast_1", "batch_size", "total_sequence_length"),
    ]

    assert kinds(*noise, past()) == {"input.1": "tokens", "onnx::Cast_1": "mask"}


def test_a_sum_of_two_lengths_is_the_total():
    summed = tensor("attention_mask", "batch_size", f"{PAST} + sequence_length")

    assert axes_of(summed) == ("batch", "total")


def test_a_call_is_given_the_new_tokens_and_the_mask_of_all():
    inputs = inputs_of(
        [
            tensor("input_ids", "batch_size", "sequence_length"),
            tensor("attention_mask", "batch_size", "total_sequence_length"),
            tensor("position_ids", "batch_size", "sequence_length"),
            past(),
        ]
    )
    call = inputs.part(inputs.whole(TOKENS, MASK), 1, 3)

    assert call["input_ids"].tolist() == [[5, 6], [2, 3]]
    assert call["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert call["position_ids"].tolist() == [[0, 0], [1, 2]]


@pytest.mark.parametrize(
    ("dtype", "seen", "hidden"),
    [("float32", 0.0, -1e9), ("float16", 0.0, -1e4), ("bool", True, False), ("int64", 1, 0)],
)
def test_a_mask_of_queries_and_keys_is_causal_and_knows_padding(dtype, seen, hidden):
    mask = tensor("m", "batch_size", 1, "sequence_length", "total_sequence_length", dtype=dtype)
    inputs = inputs_of([tensor("ids", "batch_size", "sequence_length"), mask, past()])
    call = inputs.part(inputs.whole(TOKENS, MASK), 2, 4)["m"]

    assert call.dtype == dtype
    assert call.shape == (2, 1, 2, 4)
    expected = [[False, False, True, False], [False, False, True, True]]
    assert np.array_equal(call[0, 0], np.where(expected, seen, hidden).astype(dtype))


@pytest.mark.parametrize(("dtype", "values"), [("float32", [0.0, 1.0]), ("bool", [False, True]), ("int32", [0, 1])])
def test_a_mask_of_tokens_keeps_its_type(dtype, values):
    inputs = inputs_of([tensor("ids", "b", "s"), tensor("attention_mask", "b", "s", dtype=dtype)])
    mask = inputs.whole(TOKENS, MASK)["attention_mask"]

    assert mask.dtype == dtype
    assert mask[0].tolist() == [values[0]] * 2 + [values[1]] * 2


def test_embeddings_follow_the_tokens():
    inputs = inputs_of([tensor("inputs_embeds", "b", "s", 6, dtype="float32")])
    values = inputs.whole(np.array([[4, 9, 4]]), np.ones((1, 3), np.int64))["inputs_embeds"]

    assert values.shape == (1, 3, 6)
    assert np.array_equal(values[0, 0], values[0, 2])
    assert not np.array_equal(values[0, 0], values[0, 1])


def test_embeddings_need_a_width():
    with pytest.raises(UsageError, match="a number for the width"):
        inputs_of([tensor("inputs_embeds", "b", "s", "d", dtype="float32")]).whole(TOKENS, MASK)


def test_axes_may_stand_in_any_order():
    inputs = inputs_of([tensor("ids", "sequence_length", "batch_size"), past()])
    feeds = inputs.whole(TOKENS, MASK)

    assert feeds["ids"].tolist() == TOKENS.T.tolist()
    assert inputs.part(feeds, 1, 2)["ids"].tolist() == [[5, 2]]
    assert inputs.rows(feeds, [1])["ids"].tolist() == [[1], [2], [3], [4]]


def test_embeddings_may_have_the_sequence_first():
    inputs = inputs_of([tensor("e", "sequence_length", "batch_size", 6, dtype="float32"), past()])

    assert inputs.whole(TOKENS, MASK)["e"].shape == (4, 2, 6)


def test_a_text_alone_needs_no_batch_axis():
    inputs = inputs_of([tensor("ids", "sequence_length"), past()])

    assert inputs.whole(TOKENS[1:], MASK[1:])["ids"].tolist() == [1, 2, 3, 4]


def test_positions_for_several_axes_are_repeated():
    inputs = inputs_of([tensor("ids", "b", "s"), tensor("position_ids", 3, "batch_size", "sequence_length"), past()])

    assert inputs.whole(TOKENS, MASK)["position_ids"].shape == (3, 2, 4)


def test_token_types_are_dealt_out_where_asked():
    inputs = inputs_of([tensor("input_ids", "b", "s"), tensor("token_type_ids", "b", "s")])

    assert inputs.whole(TOKENS, MASK)["token_type_ids"].max() == 0
    assert inputs.whole(TOKENS, MASK, types=2)["token_type_ids"][1].tolist() == [1, 0, 1, 0]


def test_an_input_without_tokens_is_given_zeros():
    inputs = inputs_of([tensor("ids", "b", "s"), tensor("flag", dtype="bool"), tensor("last", "n", dtype="float32")])
    feeds = inputs.whole(TOKENS, MASK)

    assert (feeds["flag"].shape, feeds["flag"].item()) == ((), False)
    assert [given.kind for given in inputs.given] == ["tokens", "other", "other"]


def test_a_model_without_text_is_refused():
    with pytest.raises(UsageError, match="found flag"):
        _ = inputs_of([tensor("flag", dtype="bool")]).tokens


def test_a_static_model_tells_its_size():
    static = tensor("input_ids", 1, 32)
    inputs = inputs_of([tensor("input_ids", "batch_size", "sequence_length"), past()])

    assert (fixed_size(inputs, [static], "batch"), fixed_size(inputs, [static], "new")) == (1, 32)
    assert fixed_size(inputs, [tensor("input_ids", "b", "s")], "new") is None


def test_logits_are_known_by_name_then_by_rank():
    hidden, logits = tensor("hidden", "b", "s", 8, dtype="float32"), tensor("logits", "b", "s", 9, dtype="float32")
    pooled = tensor("pooled", "b", 8, dtype="float32")

    assert logits_name([hidden, logits]) == "logits"
    assert logits_name([pooled, hidden]) == "hidden"
    assert logits_name([pooled]) == "pooled"
    with pytest.raises(UsageError, match="an output of logits, found ids"):
        logits_name([tensor("ids", "b")])


def test_a_model_without_a_batch_axis_has_no_fixed_batch():
    inputs = inputs_of([tensor("ids", "sequence_length"), past()])

    assert fixed_size(inputs, [tensor("ids", 24)], "batch") is None
    assert fixed_size(inputs, [tensor("ids", 24)], "new") == 24


# The cache


def test_an_empty_past_has_no_tokens_and_the_sizes_that_are_declared():
    assert empty_shape(past(), 3) == (3, 2, 0, 8)
    assert empty_shape(past("p", "2*batch_size", PAST, 8), 3) == (6, 0, 8)
    assert empty_shape(past("past_key_values.0.key", "batch", 4, "past", 8), 3) == (3, 4, 0, 8)


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        (("batch_size", 2, 4, 8), "one dim called past_sequence_length"),
        (("batch_size", "heads", PAST, 8), "dim `heads`"),
    ],
)
def test_a_past_whose_shape_is_not_told_is_refused(dims, message):
    with pytest.raises(UsageError, match=message):
        empty_shape(past("past_key_values.0.key", *dims), 1)


def test_pasts_and_presents_pair_in_order_and_keep_their_layer():
    pasts = [past("past_key_values.3.key"), past("past_key_values.3.value")]
    presents = [past("present.3.key"), past("present.3.value")]
    entries = find_cache([tensor("ids", "b", "s"), *pasts], [past("logits", "b", "s", 9), *presents])

    assert [(entry.layer, entry.part, entry.present, entry.axis) for entry in entries] == [
        (3, "key", "present.3.key", 2),
        (3, "value", "present.3.value", 2),
    ]
    assert cache_mismatch(entries) is None
    crossed = cache_entries(pasts, presents[::-1])
    assert "stand at the same place" in cache_mismatch(crossed)


def test_pasts_of_any_name_are_counted_by_place():
    names = ["a", "b", "c", "d"]
    pasts = [past(name, PAST, 2, 8) for name in names]

    assert [(e.layer, e.part, e.axis) for e in cache_entries(pasts, pasts)] == [
        (0, "key", 0),
        (0, "value", 0),
        (1, "key", 0),
        (1, "value", 0),
    ]


def test_presents_of_any_name_are_told_by_how_they_lie():
    pasts = [past(f"p_key_{layer}", "batch_size", 2, "past_sequence_length", 8) for layer in range(2)]
    presents = [past(f"n_key_{layer}", "batch_size", 2, "anything", 8) for layer in range(2)]

    entries = find_cache([tensor("ids", "b", "s"), *pasts], [past("scores", "b", "s", 9), *presents])

    assert [(entry.layer, entry.present) for entry in entries] == [(0, "n_key_0"), (1, "n_key_1")]


def test_a_buffer_of_any_name_is_a_past_and_a_mask_for_it_is_none():
    buffer = past("k_0_in", "batch_size", 2, "max_length", 8)
    masks = [tensor("m", "batch_size", "max_length"), tensor("n", "batch_size", 1, "sequence_length", "max_length")]

    entries = find_cache([*masks, buffer], [past("logits", "b", "s", 9), past("k_0", "batch_size", 2, "max_length", 8)])

    assert [(entry.past.name, entry.axis) for entry in entries] == [("k_0_in", 2)]


def test_a_state_lies_as_values_do():
    across = {
        "key": ("batch", "kv_heads", "head_dim", "sequence"),
        "value": ("batch", "kv_heads", "sequence", "head_dim"),
    }
    pasts = [past(f"past_{kind}_0_in", "batch_size", 2, 8, 8) for kind in ("key", "value", "state")]

    entries = cache_entries(pasts, pasts, across)

    assert [(entry.part, entry.axis) for entry in entries] == [("key", 3), ("value", 2), ("state", 2)]


def test_a_model_without_pasts_has_no_cache_and_half_a_cache_is_refused():
    assert find_cache([tensor("ids", "b", "s")], [past("present.0.key")]) == ()
    with pytest.raises(UsageError, match="found 0 and 1"):
        find_cache([past()], [])


def test_of_two_axes_of_new_tokens_the_last_is_the_keys():
    length = "sequence_length"
    given = [tensor("input_ids", "batch_size", length), tensor("causal_mask", "batch_size", 1, length, length)]

    assert kinds(*given) == {"input_ids": "tokens", "causal_mask": "visibility"}
    feeds = inputs_of(given).whole(TOKENS, MASK)
    assert feeds["causal_mask"].shape == (2, 1, 4, 4)
    assert feeds["causal_mask"][0, 0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_a_past_lies_as_a_present_does_and_a_mask_does_not():
    presents = [tensor("memory_out", "batch_size", 2, "total_sequence_length", 8, dtype="float32")]
    mask = ("batch_size", 1, "sequence_length", "total_sequence_length")
    asked = {
        "a past": past("memory_in"),
        "no dim is told": tensor("memory_in", "a", "b", "c", "d", dtype="float32"),
        "whole numbers": tensor("mask", *mask),
        "as many bits": tensor("mask", *mask, dtype="float32"),
        "another rank": tensor("mask", "batch_size", 1, "total_sequence_length", dtype="float32"),
    }

    assert [name for name, one in asked.items() if may_be_past(one, presents)] == ["a past", "no dim is told"]
