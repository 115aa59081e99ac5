"""What kvsurgeon does, for people who hold a path, a proto or an `ir.Model`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsurgeon.anatomy import Attention, Decoder
from kvsurgeon.io import load, save
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Source, Subject
from kvsurgeon.report import grid
from kvsurgeon.runtime import generate
from kvsurgeon.runtime.text import Prompt
from kvsurgeon.targets import Target
from kvsurgeon.workflow.delivery import deliver
from kvsurgeon.workflow.keys import capture_keys
from kvsurgeon.workflow.loss import measure as measure_loss
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.replication import replicate_kv_heads
from kvsurgeon.workflow.surgery import Surgery, operate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Pipeline",
    "find_attention",
    "generate",
    "inject",
    "inspect",
    "load",
    "measure_loss",
    "plot",
    "replicate_kv_heads",
    "save",
    "verify",
]


def inspect(source: Source, *, folder: str | Path | None = None) -> Decoder:
    """Return what was found in the model: its attention layers, its cache if it has one, what was proved and assumed.

    Args:
        source: A file, a folder that holds one, or a model in memory, which stays as it is.
        folder: Where the external data of a model in memory lies.

    Raises:
        InputError: The model cannot be read.
        UnsupportedError: It is not a causal decoder that can be handled soundly.
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
        **options: The fields of `kvsurgeon.passes.cache.inject.Inject`.

    Raises:
        InputError: The model cannot be read, or its weights are not where the judge can find them.
        UnsupportedError: It cannot be handled soundly.
        ParityError: The result does not compute what the original computes; nothing was written.
    """
    if target is not None:
        return deliver(source, target, destination, folder=folder, verify=verify, options=options)
    return operate(source, Pipeline((Inject(**options),)), destination, folder=folder, verify=verify)


def plot(
    source: Source,
    *,
    layer: int = 0,
    prompt: Prompt | None = None,
    against: Source | None = None,
    output: str | Path | None = None,
    folder: str | Path | None = None,
) -> Figure:
    """Return a picture of the keys of a layer: a row for each group of query heads that share one, a column for each.

    Args:
        source: A file, a folder that holds one, or a model in memory, with a cache or without.
        layer: Index of the attention layer, counted in execution order.
        prompt: A text, or token ids; None takes a short text.
        against: Another model, drawn beside it on the same scale, such as the one that a pass made of it.
        output: Where to write the picture to; its name says the format.
        folder: Where weights and side files of models in memory lie.

    Raises:
        UsageError: There is no such layer, the prompt cannot be read, or the picture cannot be written.
        InputError: A model cannot be read.
        UnsupportedError: Its attention cannot be found.
    """
    sides = [
        capture_keys(one, layer=layer, prompt=prompt, folder=folder) for one in (source, against) if one is not None
    ]
    figure = grid.draw(sides)
    if output is not None:
        grid.write(figure, Path(output))
    return figure
