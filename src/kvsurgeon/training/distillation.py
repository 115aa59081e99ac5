"""Train weights of a changed model so that its logits become those of the original again (distillation)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from kvsurgeon import io
from kvsurgeon.calibration import calibration_rows
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor
from kvsurgeon.parity import Progress
from kvsurgeon.parity.difference import distance
from kvsurgeon.parity.prediction import longest_text, open_decoder, predict
from kvsurgeon.runtime import AnyDecoder, Array, Tokens
from kvsurgeon.runtime.text import load_tokenizer, side_folders
from kvsurgeon.training.torch_graph import TorchGraph, to_torch
from kvsurgeon.training.torch_operators import Tensor

_BOUND = 1e-2  # of the spread of logits: 6e-4 measured over 30 layers with merged heads; another operator gives more
_LOWEST = -1e9  # a padded vocabulary may end in minus infinity
_WARM_UP = 10  # steps in which the learning rate rises


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length and learning rate of a training.

    Attributes:
        minutes: Time, at most.
        steps: Number of steps, at most; None for any. A step trains on one row of the text.
        learning_rate: Learning rate of Adam. It rises in the first steps, and then falls to zero along half a cosine.
        row: Tokens of a row, at most.
        seed: Random seed of the order of rows.
    """

    minutes: float
    steps: int | None
    learning_rate: float
    row: int
    seed: int = 0

    def progress(self, step: int, seconds: float) -> float:
        """Return the part of the training that is done, from 0 to 1."""
        return min(1.0, max(seconds / (60 * self.minutes), 0 if self.steps is None else step / self.steps))

    def rate(self, step: int, progress: float) -> float:
        """Return the learning rate of a step, counted from 0."""
        return self.learning_rate * min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * progress)) / 2

    def order(self, rows: int) -> Iterator[int]:
        """Yield the indices of rows without end, all of them before one comes again."""
        random = np.random.default_rng(self.seed)
        while True:
            yield from random.permutation(rows).tolist()


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Trained weights.

    Attributes:
        weights: The weights, by their value in the graph; float32.
        steps: Number of steps.
        tokens: Tokens of a row.
        losses: KL divergence of each step before its change, in nats per token.
    """

    weights: Mapping[ir.Value, np.ndarray]
    steps: int
    tokens: int
    losses: tuple[float, ...]


def distill(
    model: ir.Model, weights: Sequence[ir.Value], original: Path, text: Path, folder: Path | None, schedule: Schedule,
    progress: Progress | None = None,
) -> Trained:  # fmt: skip
    """Return weights with which the logits of a model are closer to those of the original.

    What does not depend on the weights is computed by onnxruntime, everything else by torch. The logits of both are
    compared before.

    Args:
        model: The model, without a cache, in standard operators.
        weights: Initializers of its graph.
        original: The model whose logits are wanted, for the same tokens.
        text: The text, on whose first half the weights are trained.
        folder: Folder of the model.
        schedule: How long to train.
        progress: Called after each step but the first, with the number of steps that are expected.

    Raises:
        UnsupportedError: The model cannot be trained.
        RunError: onnxruntime cannot run a model.
    """
    with io.staged(model, None, folder) as proto:
        student = open_decoder(proto, "the model to train", (), folder, None)
        if student.batch not in (None, 1):
            raise _not_trainable("the batch size is fixed", "1", str(student.batch))
        rows = _rows(student, text, schedule.row, side_folders(proto, folder))
        expected = predict(student, rows[0])["logits"]
        output = next(value for value in model.graph.outputs if value.name == student.logits)
    graph = TorchGraph.of(model.graph, weights, output)
    teacher = open_decoder(original, "the original model", (), None, None)
    with io.staged(_boundary_model(model, graph), None, folder) as proto:
        given = open_decoder(proto, "the model to train", (), folder, None)
        trained = {value: to_torch(_elements(value)).requires_grad_() for value in weights}
        _check_torch(graph, trained, _boundary(given, rows[0]), expected)
        losses = _train(graph, trained, teacher, given, rows, schedule, progress)
    arrays = {value: tensor.detach().numpy() for value, tensor in trained.items()}
    return Trained(weights=arrays, steps=len(losses), tokens=rows[0].shape[1], losses=tuple(losses))


def _rows(student: AnyDecoder, text: Path, most: int, folders: Sequence[Path]) -> list[Tokens]:
    tokenizer = load_tokenizer(folders)
    (first, *_) = calibration_rows(text, tokenizer, most)
    length = student.length or longest_text(student, most, first[0].tolist())
    return calibration_rows(text, tokenizer, length, whole=student.length is not None, most=None)


def _boundary_model(model: ir.Model, graph: TorchGraph) -> ir.Model:
    """Return a copy of a model that computes the values of the boundary, and nothing else."""
    copy = copy_model(model)
    editor = Editor(copy)
    computed = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs[:] = [computed[value.name] for value in graph.boundary if value.name in computed]
    editor.finish()
    return copy


def _boundary(given: AnyDecoder, row: Tokens) -> dict[str, Array]:
    """Return the values of the boundary for a row, those of inputs included."""
    feeds = given.inputs.feeds(row, np.ones_like(row))
    return {**feeds, **given.run(feeds)}


def _elements(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def _check_torch(
    graph: TorchGraph, weights: Mapping[ir.Value, Tensor], boundary: Mapping[str, Array], expected: Array
) -> None:
    """Check that torch computes the logits that onnxruntime computes.

    Raises:
        UnsupportedError: It does not.
    """
    import torch

    try:
        with torch.no_grad():
            found = graph.compute(weights, boundary).numpy()
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:  # an operator in a form not expected
        raise _not_trainable("torch cannot compute the model", "the logits of onnxruntime", str(error)) from error
    apart = distance(expected, found) if found.shape == expected.shape else math.inf
    if not apart <= _BOUND:
        raise _not_trainable(
            "torch computes other logits than onnxruntime", f"an error of at most {_BOUND:g} of their spread",
            f"{apart:.2g}",
        )  # fmt: skip


def _train(
    graph: TorchGraph, weights: Mapping[ir.Value, Tensor], teacher: AnyDecoder, given: AnyDecoder,
    rows: Sequence[Tokens], schedule: Schedule, on_step: Progress | None,
) -> list[float]:  # fmt: skip
    """Change the weights, step by step; return the KL divergence of each step before its change."""
    import torch

    adam = torch.optim.Adam(list(weights.values()))
    start, losses = time.monotonic(), list[float]()
    order = schedule.order(len(rows))
    while (progress := schedule.progress(len(losses), time.monotonic() - start)) < 1:
        row = rows[next(order)]
        target = _log_probabilities(to_torch(predict(teacher, row)["logits"]))
        found = _log_probabilities(graph.compute(weights, _boundary(given, row)))
        loss = (target.exp() * (target - found)).sum(-1).mean()
        losses.append(float(loss.detach()))
        done = len(losses) - 1
        if on_step is not None and done:
            on_step(done, round(done / progress), f"training, KL divergence {losses[-1]:.3f} nats")
        if not math.isfinite(losses[-1]):
            raise _not_trainable("the loss is no longer finite", "a number", str(losses[-1]), "lower --learning-rate")
        for group in adam.param_groups:
            group["lr"] = schedule.rate(done, progress)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0, error_if_nonfinite=False)
        adam.step()
    return losses


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.clamp(min=_LOWEST).log_softmax(-1)


def _not_trainable(reason: str, expected: str, found: str, hint: Any = None) -> UnsupportedError:
    return UnsupportedError(reason, code=Code.NOT_TRAINABLE, expected=expected, found=found, hint=hint)
