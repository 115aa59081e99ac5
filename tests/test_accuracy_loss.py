"""Passes that are not exact: their accuracy loss is measured and reported, and not attributed to later passes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

import kvsurgeon
from kvsurgeon.errors import ParityError
from kvsurgeon.io.model_config import ModelHeads
from kvsurgeon.parity import loss
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Outcome, Subject
from kvsurgeon.reporting import json_output, table
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

DEMO = Path(kvsurgeon.__file__).parent / "demo" / "model"


@dataclass(frozen=True, kw_only=True)
class Halve:
    """Have the values of the first layer half as large."""

    name: ClassVar[str] = "halve"
    exact: bool = False

    def apply(self, subject: Subject) -> Outcome:
        projection = subject.decoder().attentions[0].value
        assert projection is not None
        value = subject.model.graph.initializers[projection.initializers[0]]
        tensor = value.const_value
        assert tensor is not None

        def halved() -> ir.TensorProtocol:
            return ir.Tensor(tensor.numpy() * np.float32(0.5))

        value.const_value = ir.LazyTensor(halved, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()))
        before, after = (ModelHeads(query=8, kv=(kv,) * 6, kv_layers=6) for kv in (2, 1))
        return Changed(edits=1, exact=self.exact, heads=(before, after))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "WINDOW", 16)
    monkeypatch.setattr(loss, "WINDOWS", 1)


def test_accuracy_loss_is_measured_reported_and_written(tmp_path: Path) -> None:
    done = run_and_save(DEMO, Pipeline((Halve(),)), tmp_path, per_layer=True)
    assert done.verification is None
    assert done.loss is not None
    assert done.loss.kl_divergence > 0
    assert done.loss.layer_errors[0] == pytest.approx(0.5, abs=1e-3)
    assert json.loads((tmp_path / "config.json").read_text())["num_key_value_heads"] == 1
    assert json_output.run_json(done)["loss"]["tokens"] == 16
    console = table.console()
    with console.capture() as said:
        console.print(table.run_summary(done))
    assert "KL divergence" in said.get()
    assert "not verified" not in said.get()


def test_a_pass_that_says_it_is_exact_and_is_not(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="the results of the model differ from those of the original"):
        run_and_save(DEMO, Pipeline((Halve(exact=True),)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_later_passes_are_verified_against_the_model_before_them(tmp_path: Path) -> None:
    done = run_and_save(DEMO, Pipeline((Halve(), Inject())), tmp_path, verify_each=True)
    assert [step.name for step in done.steps] == ["halve", "inject"]
    assert done.loss is not None
    assert done.loss.kl_divergence > 1e-3
