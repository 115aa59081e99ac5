"""How much of what a model computed is lost in another, of each attention layer too where that is asked."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from kvsurgeon.errors import UsageError
from kvsurgeon.parity import Loss, Progress, measure_loss
from kvsurgeon.passes.contract import Subject
from kvsurgeon.runtime import Source


def measure(
    original: Source,
    result: Source,
    *,
    text: str | Path | None = None,
    per_layer: bool = False,
    folder: str | Path | None = None,
    progress: Progress | None = None,
    described: ir.Model | None = None,
) -> Loss:
    """Return how far the predictions of `result` are from those of `original`, on a text.

    Args:
        original: The model as it was: a file, a folder that holds one, or a proto.
        result: The model as it is now.
        text: A file of text; None takes the one that ships. Without a tokenizer beside the original, random token ids
            are used.
        per_layer: Whether to say of the output of each attention layer too how far it is from what it was.
        folder: Where weights and side files of protos lie.
        progress: Told before each stretch of text.
        described: The graph of the result, where that refers to files that only a session can read.

    Raises:
        InputError: A model or the text cannot be read.
        UnsupportedError: Layers are to be compared, and their attention cannot be found.
        RunError: A model cannot be run.
        ParityError: The result gives something else when its cache is used, or no numbers.
    """
    layers = tuple(zip(*_attention_outputs(original, described or result, folder), strict=True)) if per_layer else ()
    return measure_loss(original, result, text=text, layers=layers, folder=folder, progress=progress)


def _attention_outputs(
    original: Source, result: Source | ir.Model, folder: str | Path | None
) -> tuple[list[str], list[str]]:
    before, after = (
        [one.output for one in Subject.of(source, folder).decoder().attentions] for source in (original, result)
    )
    if len(before) != len(after):
        raise UsageError(f"expected as many attention layers in both models, found {len(before)} and {len(after)}")
    return before, after
