"""Adversarial decoders are drawn from a seed, and the evaluation finds other outputs."""

import numpy as np
import pytest
from adversarial import Outcome
from adversarial_models import evaluation
from adversarial_models.catalogue import KINDS, kind_of, write_sample
from adversarial_models.evaluation import REFUSED, inject
from verification.chunked_comparison import LIMITED, RIGHT, WRONG, Candidate, Chunking, Reference, compare, difference

SHORT = [
    "length/where",
    "length/logarithm",
    "mask/blocks",
    "mask/window-from-end",
    "mask/third-sequence",
    "length/whole_overflow",
    "table/mask-block",
    "mixing/reduce-text",
    "mixing/shift",
    "mixing/roll-batch",
    "mixing/pairs",
    "padding/seventh-sequence",
    "content/table",
    "content/two-conditions",
    "content/product",
    "content/equal-product",
    "content/score",
]


def drawn(folder, kind, *, benign=False, number=0):
    return write_sample(1, number, folder, benign=benign, kind=kind)


def evaluated(sample, folder, monkeypatch):
    monkeypatch.setattr(evaluation, "SWEEP_LENGTHS", (65, 130))
    return evaluation.evaluate(
        sample.path, threshold=sample.threshold, heads=sample.heads, through="injector", work=folder / "injected"
    )


@pytest.mark.parametrize("kind", SHORT)
def test_an_adversarial_decoder_is_refused_limited_or_right(tmp_path, monkeypatch, kind):
    verdict = evaluated(drawn(tmp_path, kind), tmp_path, monkeypatch)
    assert verdict.verdict in (RIGHT, REFUSED, LIMITED), verdict


@pytest.mark.parametrize(
    "kind",
    ["length/where", "mask/blocks", "table/mask-block", "mixing/reduce-text", "content/product", "content/score"],
)
def test_its_benign_counterpart_is_right(tmp_path, monkeypatch, kind):
    verdict = evaluated(drawn(tmp_path, kind, benign=True), tmp_path, monkeypatch)
    assert verdict.verdict == RIGHT, verdict
    assert verdict.changes is False


def test_a_number_of_a_seed_is_one_decoder(tmp_path):
    one, other = (drawn(tmp_path / name, "mixing/experts") for name in "ab")
    assert one.path.read_bytes() == other.path.read_bytes()


def test_all_kinds_come_in_turn():
    assert {kind_of(3, number) for number in range(len(KINDS))} == set(KINDS)


def test_an_original_that_mixes_tokens_changes_with_later_ones(tmp_path):
    sample = drawn(tmp_path, "mixing/reduce-text")
    assert evaluation.original_changes(sample.path, sample.threshold, sample.heads)


def test_other_numbers_are_wrong(tmp_path):
    sample = drawn(tmp_path / "one", "mask/blocks", benign=True)
    injected = inject(sample.path, "injector", tmp_path / "injected")
    chunking = Chunking(batch=2, steps=((5, True), (9, True), (10, True)))
    reference = Reference(sample.path)
    candidate = Candidate(injected, evaluation.onnx.load(sample.path))
    assert compare(reference, candidate, [chunking]).verdict == RIGHT
    hidden = reference.kept[2, 0, 10]
    reference.kept[2, 0, 10] = [array + np.linspace(0, 1, array.shape[-1], dtype=array.dtype) for array in hidden]
    verdict = compare(reference, candidate, [chunking])
    assert (verdict.verdict, verdict.at) == (WRONG, 10)


@pytest.mark.parametrize(
    ("kind", "verdict", "changes", "suspicious"),
    [
        ("mask/blocks", RIGHT, True, True),
        ("mask/blocks", RIGHT, False, False),
        ("mask/blocks", LIMITED, True, False),
        ("output/length", RIGHT, True, False),
    ],
)
def test_right_results_of_a_changing_original_are_suspicious(kind, verdict, changes, suspicious):
    outcome = Outcome(name="0", kind=kind, benign=False, verdict=verdict, changes=changes)
    assert outcome.suspicious is suspicious
    assert not outcome.bad


# Outputs of new tokens are compared with their part of the whole


def test_rows_of_new_tokens_are_compared():
    whole = np.random.default_rng(0).standard_normal((2, 6, 9))
    assert not difference(whole[:, 4:], whole, 4, 6, 2, 1e-3)
    assert difference(whole[:, 3:5], whole, 4, 6, 2, 1e-3)


def test_flat_rows_are_compared_text_by_text():
    whole = np.random.default_rng(0).standard_normal((2, 6, 9))
    assert not difference(whole[:, 4:].reshape(4, 9), whole.reshape(12, 9), 4, 6, 2, 1e-3)


def test_a_length_is_that_of_the_text_so_far():
    assert not difference(np.array([6]), np.array([6]), 4, 6, 2, 1e-3)
    assert "2 instead of 6" in difference(np.array([2]), np.array([6]), 4, 6, 2, 1e-3)


def test_a_missing_axis_is_wrong():
    assert "shape" in difference(np.zeros((1, 9)), np.zeros((1, 6, 9)), 5, 6, 1, 1e-3)


def test_a_small_number_in_a_row_is_not_hidden_by_large_ones_in_others():
    whole = np.ones((1, 2, 3)) * [[[1.0], [1e5]]] * [0.0, 1.0, 2.0]
    found = whole.copy()
    found[0, 1, 0] += 1e4
    assert difference(found, whole, 0, 2, 1, 1e-3)
