"""The independent verifier: which tokens count, and models that return the last logits only."""

from pathlib import Path

import broken_decoders as shelf
import numpy as np
import onnx
import pytest
from decoders import CachedDecoder, Config, Decoder
from laid_out import lay_out, stored
from verification.corpus import Case
from verification.independent_verifier import ContractError, bound_of, failures, open_session, read_contract, score_case

MASK = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
TYPES = np.array([[0, 0, 1, 1], [1, 1, 0, 1]])
IDS = np.arange(8).reshape(2, 4)


def first_case(tmp_path: Path, **call: np.ndarray) -> Case:
    model = Decoder(Config(layers=1)).model()
    rows = call.pop("rows", 4)
    (case,) = lay_out(tmp_path / "group" / "model", model, {**call, "logits": np.zeros((2, rows, 7))}).cases(model)
    return case


@pytest.mark.parametrize(
    ("call", "real"),
    [
        ({"input_ids": IDS, "attention_mask": MASK}, MASK),
        ({"input_ids": IDS, "token_type_ids": TYPES, "attention_mask": MASK}, MASK),
        ({"input_ids": IDS, "attention_mask": MASK, "token_type_ids": TYPES}, MASK),
        ({"input_ids": IDS, "onnx::Cast_1": MASK}, MASK),
        ({"input_ids": IDS, "token_type_ids": TYPES}, np.ones((2, 4))),
        ({"input_ids": IDS, "kinds": TYPES}, np.ones((2, 4))),
        ({"input_ids": IDS}, np.ones((2, 4))),
    ],
    ids=["a mask", "types, then a mask", "a mask, then types", "any name", "types alone", "no padding", "ids alone"],
)
def test_which_tokens_count(tmp_path, call, real):
    np.testing.assert_array_equal(first_case(tmp_path, **call).real, real.astype(bool))


def test_logits_of_the_last_token_alone_are_a_case_of_all_tokens(tmp_path):
    case = first_case(tmp_path, input_ids=IDS, attention_mask=MASK, rows=1)
    assert (case.batch, case.total, case.last_only) == (2, 4, True)
    np.testing.assert_array_equal(case.real, [[True], [True]])


def last_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, with logits of the last token alone."""
    head = next(node for node in model.graph.node if node.output[0] == "logits")
    head.output[0] = "all_logits"
    for name, value in {"first": [-1], "end": [2**31], "axis": [1]}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    model.graph.node.append(onnx.helper.make_node("Slice", ["all_logits", "first", "end", "axis"], ["logits"]))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    return model


def whole(model: onnx.ModelProto) -> onnx.ModelProto:
    return model


def failed_scores(tmp_path: Path, original: onnx.ModelProto, cached: onnx.ModelProto) -> set[str]:
    """Return the ways of feeding in which a model with a cache is found wrong."""
    calls = [stored(original, batch=1, length=14), stored(original, batch=2, length=11)]
    entry = lay_out(tmp_path / "group" / "model", original, *calls)
    session = open_session(cached, entry.folder)
    contract = read_contract(session, original)
    scores = [score for case in entry.cases(original) for score in score_case(session, contract, case)]
    assert len(scores) == 2 * 3
    return {score.chunking for score in failures(scores, bound_of(original))}


@pytest.mark.parametrize("form", [whole, last_only])
def test_a_right_cache_is_right(tmp_path, form):
    assert failed_scores(tmp_path, form(Decoder().model()), form(CachedDecoder().model())) == set()


@pytest.mark.parametrize("form", [whole, last_only])
@pytest.mark.parametrize(
    "broken", [shelf.WrongCorner, shelf.MissingOffset, shelf.PastPaddingIgnored, shelf.StaleRotary]
)
def test_a_wrong_cache_is_wrong(tmp_path, form, broken):
    assert "ragged chunks" in failed_scores(tmp_path, form(Decoder().model()), form(broken().model()))


def test_a_cache_that_answers_for_other_tokens_than_the_original_breaks_the_contract(tmp_path):
    with pytest.raises(ContractError, match=r"has shape \(1, 14, 61\)|has shape \(1, 1, 61\)"):
        failed_scores(tmp_path, last_only(Decoder().model()), CachedDecoder().model())
