"""Kinds and values of inputs follow from dims, then from names, then from their order."""

import numpy as np
import pytest

from kvsurgeon.errors import UsageError
from kvsurgeon.runtime import ValueInfo
from kvsurgeon.runtime.axes import (
    axes_of,
    cache_entries,
    cache_mismatch,
    find_cache,
    may_be_past,
    past_axis,
    shape_with_rows,
)
from kvsurgeon.runtime.decoder import logits_name
from kvsurgeon.runtime.feeds import fixed_size, inputs_of

PAST = "past_sequence_length"
MASK = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
TOKENS = np.array([[5, 5, 6, 7], [1, 2, 3, 4]])


def tensor(name, *dims, dtype="int64"):
    return ValueInfo(name=name, dtype=np.dtype(dtype), dims=dims)


def past(name="past_key_values.0.key", *dims):
    return tensor(name, *(dims or ("batch_size", 2, PAST, 8)), dtype="float32")


def empty_shape(tensor, batch):
    return shape_with_rows(tensor, past_axis(tensor), batch, 0)


def kinds(*tensors):
    return {spec.name: spec.kind for spec in inputs_of(tensors).specs}


def test_knows_the_names_of_exporters():
    given = [
        tensor(name, "batch", "sequence") for name in ("attention_mask", "token_type_ids", "position_ids", "input_ids")
    ]

    assert kinds(*given) == {
        "attention_mask": "padding_mask",
        "token_type_ids": "token_types",
        "position_ids": "positions",
        "input_ids": "tokens",
    }


def test_dims_give_kinds_if_names_do_not():
    unnamed = [
        tensor("input.1", "batch_size", "sequence_length"),
        tensor("onnx::Cast_1", "batch_size", "total_sequence_length"),
    ]

    assert kinds(*unnamed, past()) == {"input.1": "tokens", "onnx::Cast_1": "padding_mask"}


def test_a_sum_of_two_lengths_is_the_total():
    summed = tensor("attention_mask", "batch_size", f"{PAST} + sequence_length")

    assert axes_of(summed) == ("batch", "total")


def test_a_call_takes_the_new_tokens_and_the_mask_of_all():
    inputs = inputs_of(
        [
            tensor("input_ids", "batch_size", "sequence_length"),
            tensor("attention_mask", "batch_size", "total_sequence_length"),
            tensor("position_ids", "batch_size", "sequence_length"),
            past(),
        ]
    )
    call = inputs.part(inputs.feeds(TOKENS, MASK), 1, 3)

    assert call["input_ids"].tolist() == [[5, 6], [2, 3]]
    assert call["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert call["position_ids"].tolist() == [[0, 0], [1, 2]]


@pytest.mark.parametrize(
    ("dtype", "visible", "hidden"),
    [("float32", 0.0, -1e9), ("float16", 0.0, -1e4), ("bool", True, False), ("int64", 1, 0)],
)
def test_a_query_key_mask_is_causal_and_masks_padding(dtype, visible, hidden):
    mask = tensor("m", "batch_size", 1, "sequence_length", "total_sequence_length", dtype=dtype)
    inputs = inputs_of([tensor("ids", "batch_size", "sequence_length"), mask, past()])
    call = inputs.part(inputs.feeds(TOKENS, MASK), 2, 4)["m"]

    assert call.dtype == dtype
    assert call.shape == (2, 1, 2, 4)
    expected = [[False, False, True, False], [False, False, True, True]]
    assert np.array_equal(call[0, 0], np.where(expected, visible, hidden).astype(dtype))


@pytest.mark.parametrize(("dtype", "values"), [("float32", [0.0, 1.0]), ("bool", [False, True]), ("int32", [0, 1])])
def test_a_padding_mask_has_the_type_of_its_input(dtype, values):
    inputs = inputs_of([tensor("ids", "b", "s"), tensor("attention_mask", "b", "s", dtype=dtype)])
    mask = inputs.feeds(TOKENS, MASK)["attention_mask"]

    assert mask.dtype == dtype
    assert mask[0].tolist() == [values[0]] * 2 + [values[1]] * 2


def test_embeddings_follow_the_tokens():
    inputs = inputs_of([tensor("inputs_embeds", "b", "s", 6, dtype="float32")])
    values = inputs.feeds(np.array([[4, 9, 4]]), np.ones((1, 3), np.int64))["inputs_embeds"]

    assert values.shape == (1, 3, 6)
    assert np.array_equal(values[0, 0], values[0, 2])
    assert not np.array_equal(values[0, 0], values[0, 1])


def test_embeddings_need_a_width():
    with pytest.raises(UsageError, match="a number for the width"):
        inputs_of([tensor("inputs_embeds", "b", "s", "d", dtype="float32")]).feeds(TOKENS, MASK)


def test_axes_may_have_any_order():
    inputs = inputs_of([tensor("ids", "sequence_length", "batch_size"), past()])
    feeds = inputs.feeds(TOKENS, MASK)

    assert feeds["ids"].tolist() == TOKENS.T.tolist()
    assert inputs.part(feeds, 1, 2)["ids"].tolist() == [[5, 2]]
    assert inputs.rows(feeds, [1])["ids"].tolist() == [[1], [2], [3], [4]]


def test_embeddings_may_have_the_sequence_first():
    inputs = inputs_of([tensor("e", "sequence_length", "batch_size", 6, dtype="float32"), past()])

    assert inputs.feeds(TOKENS, MASK)["e"].shape == (4, 2, 6)


def test_a_single_text_needs_no_batch_axis():
    inputs = inputs_of([tensor("ids", "sequence_length"), past()])

    assert inputs.feeds(TOKENS[1:], MASK[1:])["ids"].tolist() == [1, 2, 3, 4]


def test_positions_for_several_axes_are_repeated():
    for batch, length in (("batch_size", "sequence_length"), ("b", "s")):
        inputs = inputs_of([tensor("ids", "b", "s"), tensor("position_ids", 3, batch, length), past()])

        assert inputs.feeds(TOKENS, MASK)["position_ids"].shape == (3, 2, 4)


def test_token_types_are_used_if_requested():
    inputs = inputs_of([tensor("input_ids", "b", "s"), tensor("token_type_ids", "b", "s")])

    assert inputs.feeds(TOKENS, MASK)["token_type_ids"].max() == 0
    assert inputs.feeds(TOKENS, MASK, token_types=2)["token_type_ids"][1].tolist() == [1, 0, 1, 0]


def test_other_inputs_are_zero():
    inputs = inputs_of([tensor("ids", "b", "s"), tensor("flag", dtype="bool"), tensor("last", "n", dtype="float32")])
    feeds = inputs.feeds(TOKENS, MASK)

    assert (feeds["flag"].shape, feeds["flag"].item()) == ((), False)
    assert [spec.kind for spec in inputs.specs] == ["tokens", "other", "other"]


def test_rejects_a_model_without_tokens_and_embeddings():
    with pytest.raises(UsageError, match="found flag"):
        _ = inputs_of([tensor("flag", dtype="bool")]).tokens


def test_a_static_model_has_fixed_sizes():
    static = tensor("input_ids", 1, 32)
    inputs = inputs_of([tensor("input_ids", "batch_size", "sequence_length"), past()])

    assert (fixed_size(inputs, [static], "batch"), fixed_size(inputs, [static], "sequence")) == (1, 32)
    assert fixed_size(inputs, [tensor("input_ids", "b", "s")], "sequence") is None


def test_logits_follow_from_name_then_rank():
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
    assert fixed_size(inputs, [tensor("ids", 24)], "sequence") == 24


# The cache


def test_an_empty_past_has_no_rows_and_the_declared_sizes():
    assert empty_shape(past(), 3) == (3, 2, 0, 8)
    assert empty_shape(past("p", "2*batch_size", PAST, 8), 3) == (6, 0, 8)
    assert empty_shape(past("past_key_values.0.key", "batch", 4, "past", 8), 3) == (3, 4, 0, 8)


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        (("batch_size", "heads", "rows", 8), "one dim called past_sequence_length"),
        (("batch_size", "heads", PAST, 8), "dim `heads`"),
    ],
)
def test_rejects_a_past_of_unknown_shape(dims, message):
    with pytest.raises(UsageError, match=message):
        empty_shape(past("past_key_values.0.key", *dims), 1)


def test_pasts_and_presents_pair_in_order():
    pasts = [past("past_key_values.3.key"), past("past_key_values.3.value")]
    presents = [past("present.3.key"), past("present.3.value")]
    entries = find_cache([tensor("ids", "b", "s"), *pasts], [past("logits", "b", "s", 9), *presents])

    assert [(entry.layer, entry.part, entry.present, entry.axis) for entry in entries] == [
        (3, "key", "present.3.key", 2),
        (3, "value", "present.3.value", 2),
    ]
    assert cache_mismatch(entries) is None
    crossed = cache_entries(pasts, presents[::-1])
    assert "pair by order, but not by name" in cache_mismatch(crossed)


def test_pasts_of_other_names_are_numbered_by_order():
    names = ["a", "b", "c", "d"]
    pasts = [past(name, PAST, 2, 8) for name in names]

    assert [(e.layer, e.part, e.axis) for e in cache_entries(pasts, pasts)] == [
        (0, "key", 0),
        (0, "value", 0),
        (1, "key", 0),
        (1, "value", 0),
    ]


def test_presents_of_other_names_have_the_type_and_rank_of_pasts():
    pasts = [past(f"p_key_{layer}", "batch_size", 2, "past_sequence_length", 8) for layer in range(2)]
    presents = [past(f"n_key_{layer}", "batch_size", 2, "anything", 8) for layer in range(2)]

    entries = find_cache([tensor("ids", "b", "s"), *pasts], [past("scores", "b", "s", 9), *presents])

    assert [(entry.layer, entry.present) for entry in entries] == [(0, "n_key_0"), (1, "n_key_1")]


def test_a_buffer_is_a_past_and_its_mask_is_not():
    buffer = past("k_0_in", "batch_size", 2, "max_length", 8)
    masks = [tensor("m", "batch_size", "max_length"), tensor("n", "batch_size", 1, "sequence_length", "max_length")]

    entries = find_cache([*masks, buffer], [past("logits", "b", "s", 9), past("k_0", "batch_size", 2, "max_length", 8)])

    assert [(entry.past.name, entry.axis) for entry in entries] == [("k_0_in", 2)]


def test_a_state_has_the_layout_of_values():
    across = {
        "key": ("batch", "kv_heads", "head_dim", "sequence"),
        "value": ("batch", "kv_heads", "sequence", "head_dim"),
    }
    pasts = [past(f"past_{kind}_0_in", "batch_size", 2, 8, 8) for kind in ("key", "value", "state")]

    entries = cache_entries(pasts, pasts, across)

    assert [(entry.part, entry.axis) for entry in entries] == [("key", 3), ("value", 2), ("state", 2)]


def test_a_model_without_pasts_has_no_cache_and_half_a_cache_is_rejected():
    assert find_cache([tensor("ids", "b", "s")], [past("present.0.key")]) == ()
    with pytest.raises(UsageError, match="found 0 and 1"):
        find_cache([past()], [])


def test_the_last_of_two_sequence_axes_is_that_of_keys():
    length = "sequence_length"
    given = [tensor("input_ids", "batch_size", length), tensor("causal_mask", "batch_size", 1, length, length)]

    assert kinds(*given) == {"input_ids": "tokens", "causal_mask": "query_key_mask"}
    feeds = inputs_of(given).feeds(TOKENS, MASK)
    assert feeds["causal_mask"].shape == (2, 1, 4, 4)
    assert feeds["causal_mask"][0, 0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_a_past_has_the_type_and_rank_of_a_present_and_no_axis_of_new_tokens():
    presents = [tensor("state_out", "batch_size", 2, "total_sequence_length", 8, dtype="float32")]
    mask = ("batch_size", 1, "sequence_length", "total_sequence_length")
    inputs = {
        "a past": past("state_in"),
        "unknown dims": tensor("state_in", "a", "b", "c", "d", dtype="float32"),
        "integers": tensor("mask", *mask),
        "same type": tensor("mask", *mask, dtype="float32"),
        "another rank": tensor("mask", "batch_size", 1, "total_sequence_length", dtype="float32"),
    }

    assert [name for name, one in inputs.items() if may_be_past(one, presents)] == ["a past", "unknown dims"]
