"""Training brings the logits of a changed model back to those of the original, or is rejected by a reason.

What runs torch is skipped where it is not installed: the extra `train`.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoders import Config, Decoder
from laws import in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.errors import Code, ParityError, UnsupportedError, UsageError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.passes.heads import uptrain
from kvsurgeon.passes.heads.merge_kv_heads import MergeKvHeads
from kvsurgeon.passes.heads.uptrain import Uptrain
from kvsurgeon.training import Schedule, projection_weights, replace_weights
from kvsurgeon.training.torch_graph import TorchGraph
from kvsurgeon.training.torch_operators import OPERATORS
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

CONFIG = Config(layers=2, vocabulary=9, hidden=8, heads=2, kv_heads=2, windowed=())
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="needs the extra `train`")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "ids.txt"
    path.write_text(" ".join(map(str, np.random.default_rng(0).integers(0, 9, 200))))
    return path


@pytest.fixture
def original(tmp_path: Path) -> Path:
    path = tmp_path / "original.onnx"
    onnx.save(Decoder(CONFIG).model(), path)
    return path


def merged(original: Path, text: Path) -> Subject:
    subject = Subject.of(original)
    MergeKvHeads(kv_heads=1, method="mean").apply(subject)
    subject.changed()
    subject.text = text
    return subject


def training(original: Path, **options: object) -> Uptrain:
    return Uptrain(against=str(original), **{"steps": 8, "learning_rate": 0.02, "row_length": 32, **options})


@needs_torch
@pytest.mark.parametrize("passes", ["merge-kv-heads{kv-heads=1,method=mean}", "merge-kv-heads{kv-heads=1},inject"])
def test_training_lowers_the_loss_to_the_original(original: Path, text: Path, passes: str) -> None:
    step = f"uptrain{{against={original},steps=8,learning-rate=0.02,row-length=32}}"

    before = run_and_save(original, Pipeline.parse(passes), text=text, seed=1, effort="quick").loss
    run = run_and_save(original, Pipeline.parse(f"{passes},{step}"), text=text, seed=1, effort="quick")

    assert before is not None
    assert run.loss is not None
    assert run.loss.kl_divergence < before.kl_divergence
    assert f"KL divergence {before.kl_divergence:.3f}" in " ".join(run.notes)


@needs_torch
def test_the_loss_is_measured_against_the_original(original: Path, text: Path, tmp_path: Path) -> None:
    onnx.save(io.to_proto(merged(original, text).model), tmp_path / "merged.onnx")

    run = run_and_save(tmp_path / "merged.onnx", Pipeline((training(original, steps=1),)), text=text, seed=1)

    assert run.loss is not None
    assert run.loss.kl_divergence > 1e-3  # one step changes little, but merged heads are far from the original


@needs_torch
def test_only_weights_of_projections_change(original: Path, text: Path) -> None:
    subject = merged(original, text)
    Inject().apply(subject)
    subject.changed()
    before = {name: value.const_value for name, value in subject.model.graph.initializers.items()}
    nodes = [node.op_type for node in subject.model.graph]

    assert isinstance(training(original, steps=1).apply(subject), Changed)

    after = subject.model.graph.initializers
    assert [node.op_type for node in subject.model.graph] == nodes
    assert sum(name not in before for name in after) == 8  # query, key, value and output of two layers
    assert all(after[name].const_value is before[name] for name in after if name in before)


@needs_torch
def test_float16_weights_stay_float16(tmp_path: Path, text: Path) -> None:
    model = Decoder(replace(CONFIG, dtype="float16")).model()
    onnx.save(model, tmp_path / "half.onnx")
    subject = merged(tmp_path / "half.onnx", text)

    training(tmp_path / "half.onnx", steps=1).apply(subject)

    assert in_onnxruntime(io.to_proto(subject.model))(texts(model))["logits"].dtype == np.float16


@needs_torch
def test_an_operator_that_torch_computes_otherwise_is_rejected(
    original: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPERATORS, "Softmax", lambda call: call[0])
    with pytest.raises(UnsupportedError, match="torch computes other logits") as caught:
        training(original).apply(merged(original, text))
    assert caught.value.code is Code.NOT_TRAINABLE


@needs_torch
def test_another_vocabulary_is_rejected(original: Path, text: Path, tmp_path: Path) -> None:
    onnx.save(Decoder(replace(CONFIG, vocabulary=11)).model(), tmp_path / "other.onnx")
    with pytest.raises(ParityError, match=r"expected logits \[1, \d+, 11\]"):
        training(tmp_path / "other.onnx").apply(merged(original, text))


def test_an_operator_without_torch_is_rejected(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = Subject.of(original).analysis()
    monkeypatch.delitem(OPERATORS, "Softmax")
    with pytest.raises(UnsupportedError, match=r"cannot train through this operator.*found Softmax"):
        TorchGraph.of(analysis.model.graph, projection_weights(analysis), analysis.model.graph.outputs[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0}, "option minutes: expected a number above 0"),
        ({"learning_rate": float("nan")}, "option learning-rate"),
        ({"steps": 0}, "option steps"),
        ({"row_length": 1}, "option row-length"),
    ],
)
def test_options_are_checked(original: Path, text: Path, options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        training(original, **options).apply(merged(original, text))


def test_no_text_and_no_torch_are_named(original: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--text FILE"):
        training(original).apply(Subject.of(original))
    monkeypatch.setattr(uptrain, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"kvsurgeon\[train\]"):
        training(original).apply(merged(original, text))


def test_quantized_projections_are_rejected() -> None:
    model = read("""
g (int64[b, n] ids) => (float[b, n, 16] logits)
<float[9, 16] table, int8[16, 16] wq, float scale = {0.01}, float[16, 16] wk, float[16, 16] wv, float[16, 16] wo,
 int64 zero = {0}, int64 one = {1}, int64[1] first = {0}, int64[1] second = {1}, float masked = {-10000.0}>
{
  x = Gather(table, ids)
  sizes = Shape(ids)
  length = Gather(sizes, one)
  range = Range(zero, length, one)
  row = Unsqueeze(range, first)
  column = Unsqueeze(range, second)
  visible = LessOrEqual(row, column)
  weights = DequantizeLinear(wq, scale)
  q = MatMul(x, weights)
  k = MatMul(x, wk)
  v = MatMul(x, wv)
  kt = Transpose<perm = [0, 2, 1]>(k)
  s = MatMul(q, kt)
  seen = Where(visible, s, masked)
  w = Softmax<axis = -1>(seen)
  c = MatMul(w, v)
  logits = MatMul(c, wo)
}
""")
    with pytest.raises(UnsupportedError, match="stored floating-point weights") as caught:
        projection_weights(Subject.of(model).analysis())
    assert caught.value.code is Code.CANNOT_AVERAGE


def test_weights_that_a_model_stores_in_another_form_are_rejected(original: Path) -> None:
    analysis = Subject.of(original).analysis()
    trained = {value: np.zeros(value.shape.numpy(), np.float32) for value in projection_weights(analysis)}
    with pytest.raises(UnsupportedError, match="another form"):
        replace_weights(Subject.of(original).model, trained)


def test_rows_come_once_each_and_the_rate_rises_and_falls() -> None:
    schedule = Schedule(minutes=1, steps=100, learning_rate=1.0, row=8)
    assert sorted(islice(schedule.order(5), 5)) == [0, 1, 2, 3, 4]
    assert schedule.progress(50, 12) == 0.5
    assert schedule.progress(10, 60) == 1
    rates = [schedule.rate(step, schedule.progress(step, 0)) for step in (0, 9, 99)]
    assert rates[0] < rates[1] > rates[2] < 0.01


@needs_torch
def test_each_step_of_the_training_is_reported(original: Path, text: Path) -> None:
    subject, calls = merged(original, text), []
    subject.progress = lambda *call: calls.append(call)

    training(original).apply(subject)

    steps = [(done, of) for done, of, name in calls if name.startswith("training, KL divergence")]
    assert steps == [(done, 8) for done in range(1, 8)]
