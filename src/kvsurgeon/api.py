"""What kvsurgeon does, for people who hold a path, a proto or an `ir.Model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvsurgeon.anatomy import Attention, Decoder
from kvsurgeon.delivery import deliver
from kvsurgeon.io import load, save
from kvsurgeon.loss import measure as measure_loss
from kvsurgeon.parity import verify
from kvsurgeon.passes.contract import Source, Subject
from kvsurgeon.passes.inject import Inject
from kvsurgeon.pipeline import Pipeline
from kvsurgeon.runtime import generate
from kvsurgeon.surgery import Surgery, operate
from kvsurgeon.targets import Target

__all__ = ["Pipeline", "find_attention", "generate", "inject", "inspect", "load", "measure_loss", "save", "verify"]


def inspect(source: Source, *, folder: str | Path | None = None) -> Decoder:
    """Return what was found in the model: its attention layers, what was proved of it and what is assumed.

    Args:
        source: A file, a folder that holds one, or a model in memory, which stays as it is.
        folder: Where the external data of a model in memory lies.

    Raises:
        InputError: The model cannot be read.
        Refused: It is not a causal decoder that can be handled soundly.
    """
    return Subject.of(source, folder).decoder()


def find_attention(source: Source, *, folder: str | Path | None = None) -> tuple[Attention, ...]:
    """Return the attention layers of the model in execution order; see `inspect`."""
    return inspect(source, folder=folder).attentions


def inject(
    source: Source,
    destination: str | Path | None = None,
    *,
    folder: str | Path | None = None,
    verify: bool = True,
    target: Target | str | None = None,
    **options: Any,
) -> Surgery:
    """Give the model a KV cache, judge it, and write it to `destination` if one is given.

    Args:
        source: A file, a folder that holds one, or a model in memory.
        destination: An .onnx file or a folder, which may be the source itself.
        folder: Where the external data of a model in memory lies.
        verify: Whether the judge runs the result against the original; it needs the weights.
        target: The runtime or compiler that is to take the result, or its name: `destination` is then the folder that
            it takes as it is, side files included.
        **options: The fields of `kvsurgeon.passes.inject.Inject`.

    Raises:
        InputError: The model cannot be read, or its weights are not where the judge can find them.
        Refused: It cannot be handled soundly.
        ParityError: The result does not compute what the original computes; nothing was written.
    """
    if target is not None:
        return deliver(source, target, destination, folder=folder, verify=verify, options=options)
    return operate(source, Pipeline((Inject(**options),)), destination, folder=folder, verify=verify)
