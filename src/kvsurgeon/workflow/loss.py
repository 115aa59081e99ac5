"""Accuracy loss of a model that passes change on purpose, also by attention layer."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from kvsurgeon.errors import UsageError
from kvsurgeon.parity import AccuracyLoss, Progress
from kvsurgeon.parity import measure_loss as measure_models
from kvsurgeon.passes.contract import Subject
from kvsurgeon.runtime import Source


def measure_loss(
    reference: Source,
    candidate: Source,
    *,
    text: str | Path | None = None,
    held_out: bool = False,
    per_layer: bool = False,
    folder: str | Path | None = None,
    progress: Progress | None = None,
    graph: ir.Model | None = None,
) -> AccuracyLoss:
    """Measure the accuracy loss of a candidate model on a text.

    Args:
        reference: The model before the passes: a file, a folder with one, or a proto.
        candidate: The model after them.
        text: A text file; None for the bundled sample. Without a tokenizer next to the reference, random token IDs are
            used.
        held_out: Whether to measure on the second half of the text alone, because the candidate was calibrated on the
            first.
        per_layer: Whether to measure the error of each attention output too.
        folder: Folder of the weights and side files of protos.
        progress: Called before each window of the text.
        graph: The graph of the candidate, if the proto refers to files that only a session reads.

    Raises:
        InputError: A model or the text cannot be read.
        UnsupportedError: `per_layer` is true and attention is not found.
        RunError: A model cannot be run.
        ParityError: The candidate's logits differ if its cache is used, or are not numbers.
    """
    layers: list[tuple[str, str]] = []
    if per_layer:
        before, after = (
            [attention.output for attention in Subject.of(source, folder).decoder().attentions]
            for source in (reference, graph or candidate)
        )
        if len(before) != len(after):
            raise UsageError(f"expected as many attention layers in both models, found {len(before)} and {len(after)}")
        layers = list(zip(before, after, strict=True))
    return measure_models(
        reference, candidate, text=text, held_out=held_out, layers=layers, folder=folder, progress=progress
    )
