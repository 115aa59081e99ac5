"""Tables of context beyond their last row, in a cache whose unfilled rows come first."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
from decoders import Config, Decoder
from exports import injected
from laws import in_onnxruntime

from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject

ROWS = 40


class TableOfMasks(Decoder):
    """The decoder, whose causal mask is a table that is sliced to the length."""

    def causal(self, layer: int) -> str:
        graph = self.graph
        table, length = graph.constant(np.tri(ROWS, dtype=bool), "bool"), graph.constant([0])
        end = graph.op("Unsqueeze", self.new_length(), length)
        rows = graph.op("Slice", table, graph.constant([0]), end, graph.constant([0]))
        return graph.op("Slice", rows, graph.constant([0]), end, graph.constant([1]))


@pytest.fixture(scope="module")
def original():
    return TableOfMasks(Config(layers=2, windowed=(), attention_mask=False, max_length=2 * ROWS)).model()


def decoded(model, tokens, capacity, prompt):
    """The logits of each call: the prompt, and then token after token."""
    run = in_onnxruntime(model)
    names = [value.name for value in model.graph.input if value.name.startswith("past_key_values")]
    pasts = {name: np.zeros((1, 2, capacity, 8), np.float32) for name in names}
    past = 0
    for total in range(prompt, tokens.shape[1] + 1):
        feeds = {"input_ids": tokens[:, past:total], "past_sequence_length": np.array([past])}
        found = run(feeds | pasts)
        for name, array in pasts.items():
            rows = found[name.replace("past_key_values", "present")]
            pasts[name] = np.concatenate([array[:, :, rows.shape[2] :], rows], axis=2)
        past = total
        yield total, found["logits"][:, -1]


@pytest.mark.parametrize(("capacity", "prompt", "stops"), [(19, 15, 21), (30, 10, 32), (30, 11, 11), (38, 20, 20)])
def test_the_model_is_right_or_ends_with_an_error(original, capacity, prompt, stops):
    model = injected(original, cache="new-tokens", past_length="input")
    assert json.loads(model.metadata_props[0].value)["max_length"] == ROWS
    tokens = np.random.default_rng(0).integers(0, 61, (1, ROWS))
    reference, ended = in_onnxruntime(original), 0
    try:
        for total, logits in decoded(model, tokens, capacity, prompt):
            ended = total
            expected = reference({"input_ids": tokens[:, :total]})["logits"][:, -1]
            assert np.allclose(logits, expected, atol=1e-4)
    except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument:
        ended += 1 if ended else prompt
    assert ended == stops


def test_the_limit_is_noted(original):
    outcome = Inject(cache="new-tokens", past_length="input").apply(Subject.of(original))
    assert isinstance(outcome, Changed)
    assert outcome.notes == (f"the model ends with an error if past rows and new tokens are more than {ROWS}",)
