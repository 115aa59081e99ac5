"""A text is divided into a half to calibrate on and one to measure on; activations are those of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from laws import difference, in_onnxruntime, texts

import kvsurgeon
from kvsurgeon import io
from kvsurgeon.calibration import SecondMoment, activations, calibration_rows
from kvsurgeon.errors import LossError, UsageError
from kvsurgeon.parity import measure_loss
from kvsurgeon.passes.contract import Subject
from kvsurgeon.passes.heads.merge_kv_heads import MergeKvHeads
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

DEMO = Path(kvsurgeon.__file__).parent / "demo" / "model"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 8)
    return path


def test_rows_are_the_first_half_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text(", ".join(map(str, range(22))))
    rows = calibration_rows(path, None, 4)
    assert [row.tolist() for row in rows] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10]]]
    assert len(calibration_rows(path, None, 4, whole=True)) == 2
    with pytest.raises(UsageError, match="at least 24 tokens"):
        calibration_rows(path, None, 12, whole=True)


def test_activations_are_values_of_the_model(text: Path) -> None:
    model = io.load(DEMO)
    name = model.graph.outputs[0].name or ""
    inner = next(node.outputs[0].name for node in model.graph if node.op_type == "MatMul") or ""
    rows = list(activations(model, [inner, name], text, folder=DEMO))
    assert rows
    assert all(set(row) == {inner, name} and row[inner].shape[:2] == row[name].shape[:2] for row in rows)
    assert np.isfinite(rows[0][name]).all()


def test_second_moments_are_sums_over_all_rows() -> None:
    rows = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
    moment = SecondMoment(4)
    for row in rows:
        moment.add(row)
    whole = rows.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(moment.total, whole.T @ whole)
    assert moment.tokens == 15


def test_the_loss_of_a_calibrated_model_is_measured_on_the_second_half(text: Path) -> None:
    whole, held_out = (measure_loss(DEMO, DEMO, text=text, held_out=part) for part in (False, True))
    assert held_out.tokens < whole.tokens
    assert held_out.text == "the second half of text.txt"
    assert held_out.kl_divergence == 0


def test_nothing_is_written_if_the_loss_is_above_the_bound(tmp_path: Path, text: Path) -> None:
    merged = Pipeline((MergeKvHeads(kv_heads=1),))
    with pytest.raises(LossError, match=r"at most 0\.001 nats per token, found"):
        run_and_save(DEMO, merged, tmp_path / "out", text=text, max_loss=1e-3, effort="quick")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="--no-verify"):
        run_and_save(DEMO, merged, tmp_path / "out", max_loss=1e-3, verify=False)


def test_an_edit_of_the_analyzed_graph_is_one_of_the_model() -> None:
    original = io.load(DEMO)  # decomposing it gives another model each time
    subject = Subject.of(original, DEMO)

    analysis = subject.analysis_of_copy()

    assert analysis.model is subject.model is not original
    assert subject.analysis() is analysis


def test_a_text_has_an_effect_on_a_model_that_is_simplified() -> None:
    found = []
    for method in ("pca", "first"):
        subject = Subject.of(DEMO)
        subject.text = DEMO / "sample.txt"
        MergeKvHeads(kv_heads=1, method=method).apply(subject)
        proto = io.to_proto(subject.model, DEMO)
        found.append(in_onnxruntime(proto)(texts(proto))["logits"])
    assert difference(*found) > 1e-2
