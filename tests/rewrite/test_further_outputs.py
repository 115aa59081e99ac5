"""Outputs beside the logits mean after injection what they meant before, for the text so far."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from decoders import Config
from exports import after, injected
from further_outputs import NAME, OUTPUTS, rows_returned, with_output
from laws import in_onnxruntime

from kvsurgeon import io
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import RemoveCache
from kvsurgeon.passes.contract import Subject
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

FORMS = {
    "dynamic": {},
    "static": {"cache": "static"},
    "static, fixed": {"cache": "static", "max_length": 32},
    "static, length of the mask": {"cache": "static", "past_length": "mask"},
    "new tokens": {"cache": "new-tokens"},
    "new tokens, unfilled rows": {"cache": "new-tokens", "past_length": "input"},
}
WHOLE = [name for name, output in OUTPUTS.items() if output.rows == "all"]
REFUSED = [name for name, output in OUTPUTS.items() if output.rows is None]
OF_QUERIES = ["scores", "weights", "mean_weights", "keys_in_rows"]  # that read the cache, or feed it
OF_MASK = ["mask_of_layer", "window_of_layer", "given_mask", "tokens_that_count", "position_of_mask", "last_index"]

CUTS = (4, 5, 6, 10, 12)


def text(*, padded: bool = False) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(1).integers(0, 61, (2, CUTS[-1]))
    mask = np.ones_like(tokens)
    if padded:
        mask[1, :3] = 0
    return tokens, mask


@pytest.mark.parametrize("name", [*WHOLE, *OF_QUERIES])
def test_it_is_that_of_the_text_so_far(name):
    model = with_output(name)
    assert rows_returned(model, injected(model), *text(), CUTS) == {OUTPUTS[name].rows}


@pytest.mark.parametrize(
    ("name", "form"), list(zip([*WHOLE, *OF_QUERIES], itertools.cycle(list(FORMS)[1:]), strict=False))
)
def test_it_is_so_in_every_cache_mode(name, form):
    model = with_output(name)
    assert rows_returned(model, injected(model, **FORMS[form]), *text(), CUTS) == {OUTPUTS[name].rows}


@pytest.mark.parametrize("name", [name for name in OUTPUTS if OUTPUTS[name].rows == "new" and name not in OF_QUERIES])
def test_token_data_has_a_row_for_each_new_token(name):
    model = with_output(name)
    assert rows_returned(model, injected(model), *text(), CUTS) == {"new"}


@pytest.mark.parametrize("form", ["dynamic", "static", "new tokens, unfilled rows"])
@pytest.mark.parametrize("name", OF_MASK)
def test_it_is_that_of_a_padded_text(name, form):
    model = with_output(name)
    assert rows_returned(model, injected(model, **FORMS[form]), *text(padded=True), CUTS) == {"all"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_cache_holds_is_refused(name):
    with pytest.raises(UnsupportedError):
        Inject().apply(Subject.of(with_output(name)))


@pytest.mark.parametrize("form", ["dynamic", "static", "new tokens, unfilled rows"])
@pytest.mark.parametrize("name", ["length", "causal_trilu", "mask_of_layer", "keys", "weights", "hidden"])
def test_it_is_right_in_float16(name, form):
    model = with_output(name, Config(layers=2, window=3, dtype="float16"))
    assert rows_returned(model, injected(model, **FORMS[form]), *text(), CUTS) == {OUTPUTS[name].rows}


@pytest.mark.parametrize("form", ["dynamic", "static, fixed", "new tokens, unfilled rows"])
@pytest.mark.parametrize("name", ["positions_from_end", "window_of_layer", "values", "position_of_mask"])
def test_it_is_right_after_a_thousand_tokens(name, form):
    model = with_output(name, Config(layers=2, window=3, max_length=1200))
    tokens = np.random.default_rng(2).integers(0, 61, (1, 1100))
    options = dict(FORMS[form]) | ({"max_length": 1200} if "max_length" in FORMS[form] else {})
    cuts = (3, 700, 701, 734, 1031, 1040, 1100)
    assert rows_returned(model, injected(model, **options), tokens, np.ones_like(tokens), cuts) == {"all"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["length", "mask_of_layer", "given_mask", "keys", "hidden", "weights"])
def test_a_result_with_it_can_be_read_and_its_cache_removed(name, form):
    model = with_output(name)
    result = injected(model, **FORMS[form])
    assert len(Subject.of(result).decoder().cache) == 4
    without = after(result, RemoveCache())
    tokens, mask = text()
    size = 32 if "max_length" in FORMS[form] else tokens.shape[1]  # the length of the result
    ids = {"input_ids": np.resize(tokens, (2, size)), "attention_mask": np.resize(mask, (2, size))}
    expected, found = (in_onnxruntime(one)(ids)[NAME] for one in (model, without))
    assert found.shape == expected.shape
    assert np.allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("name", ["causal", "positions_flat", "hidden_flat", "length", "keys", "weights"])
def test_it_is_verified(name):
    model = with_output(name)
    assert verify(model, injected(model), effort="quick", seed=0).problems == ()


def test_a_result_that_cannot_be_read_has_a_note(monkeypatch):
    def unreadable(_subject):
        raise UnsupportedError("its experts are unknown", code=Code.UNTRACEABLE_SEQUENCE)

    monkeypatch.setattr(Subject, "cache", unreadable)
    run = run_and_save(with_output("causal"), Pipeline((Inject(),)), verify=False)
    assert run.notes[-1] == "inspect and passes cannot read the cache of the result: its experts are unknown"


def test_the_check_does_not_change_the_result():
    run = run_and_save(with_output("causal"), Pipeline((Inject(),)), verify=False)
    assert rows_returned(with_output("causal"), io.to_proto(run.model), *text(), CUTS) == {"all"}
