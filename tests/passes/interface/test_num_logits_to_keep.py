"""An input says of how many tokens of a call logits are computed; what they are does not change."""

from __future__ import annotations

import numpy as np
import pytest
from decoders import Config, Decoder
from exports import export
from laws import ALLOWED, difference, in_onnxruntime

from kvsurgeon import io
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.interface.num_logits_to_keep import NumLogitsToKeep
from kvsurgeon.workflow.pipeline import Pipeline

MODELS = {"own": Decoder(Config(layers=2)).model(), "exported": export("gpt2_torchscript_sdpa")}


def expected_rows(whole: np.ndarray, start: int, end: int, keep: int) -> np.ndarray:
    """Return the logits of the last tokens of a call over tokens `start` to `end`."""
    return whole[:, start:end] if keep == 0 else whole[:, max(start, end - keep) : end]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_last_tokens_of_each_call(name):
    model = MODELS[name]
    result = io.to_proto(Pipeline((Inject(), NumLogitsToKeep())).run(model).model)
    assert verify(model, result).verdict == "same"
    ids = np.random.default_rng(3).integers(1, 40, (2, 9))
    ones = np.ones_like(ids)
    whole = in_onnxruntime(model)({"input_ids": ids, "attention_mask": ones})["logits"]
    run = in_onnxruntime(result)
    for keep in (0, 1, 3, 100):
        past = {
            value.name: np.zeros((2, *(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:])), np.float32)
            for value in result.graph.input if value.name.startswith("past")
        }  # fmt: skip
        start = 0
        for end in (5, 6, 9):
            feeds = {"input_ids": ids[:, start:end], "attention_mask": ones[:, :end]}
            found = run({**feeds, **past, "num_logits_to_keep": np.array(keep)})
            assert difference(found["logits"], expected_rows(whole, start, end, keep)) < ALLOWED["float32"]
            past = {name: found[name.replace("past_key_values", "present")] for name in past}
            start = end
