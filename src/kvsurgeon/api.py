"""The Python API, for models as a path, a proto or an `ir.Model`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsurgeon.anatomy import Attention, Decoder
from kvsurgeon.errors import UsageError
from kvsurgeon.io import load, save
from kvsurgeon.io.atomic_write import atomic_open
from kvsurgeon.parity import Effort
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Source, Subject
from kvsurgeon.reporting import key_grid
from kvsurgeon.reporting.page.build import build_page
from kvsurgeon.runtime import generate
from kvsurgeon.runtime.text import Prompt
from kvsurgeon.targets import Target
from kvsurgeon.workflow.build_target import build_target
from kvsurgeon.workflow.certificate import NO_CERTIFICATE
from kvsurgeon.workflow.confirmation import confirm
from kvsurgeon.workflow.keys import capture_keys
from kvsurgeon.workflow.loss import measure_loss
from kvsurgeon.workflow.pipeline import Pipeline, PipelineRun
from kvsurgeon.workflow.replication import replicate_kv_heads
from kvsurgeon.workflow.run_and_save import run_and_save
from kvsurgeon.workflow.verification import verify_models as verify

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Pipeline",
    "confirm",
    "find_attention",
    "generate",
    "inject",
    "inspect",
    "load",
    "measure_loss",
    "plot",
    "replicate_kv_heads",
    "report",
    "save",
    "verify",
]


def inspect(source: Source, *, folder: str | Path | None = None) -> Decoder:
    """Return the facts about a decoder: its attention layers, its cache, and what was proved and assumed.

    Args:
        source: A file, a folder that holds one, or a model in memory, which is not changed.
        folder: The folder of the external data of a model in memory.

    Raises:
        InputError: The model cannot be read.
        UnsupportedError: The model is not a causal decoder that can be handled soundly.
    """
    return Subject.of(source, folder).decoder()


def find_attention(source: Source, *, folder: str | Path | None = None) -> tuple[Attention, ...]:
    """Return the attention layers of a decoder in execution order; see `inspect`."""
    return inspect(source, folder=folder).attentions


def inject(
    source: Source,
    destination: str | Path | None = None,
    *,
    folder: str | Path | None = None,
    verify: bool = True,
    effort: Effort = "normal",
    seed: int | None = None,
    target: Target | str | None = None,
    link_weights: bool = False,
    force: bool = False,
    certificate: str | Path | None = None,
    **options: Any,
) -> PipelineRun:
    """Inject a KV cache, verify the result, and write it to `destination` if one is given.

    Args:
        source: A file, a folder that holds one, or a model in memory.
        destination: An .onnx file or a folder, which may be the source itself.
        folder: The folder of the external data of a model in memory.
        verify: Whether to verify the result against the original, which needs the weights.
        effort: How many texts the verifier compares, and of which lengths: "quick", "normal" or "thorough".
        seed: Random seed of the texts; None draws one, which the report names.
        target: The runtime or compiler that loads the result, or its name; `destination` is then the folder that it
            loads, side files included.
        link_weights: Whether to link external data into another folder instead of copying it; see `save`.
        force: Whether to replace data files and side files of other content; see `save`.
        certificate: A file to write the certificate of the result to, which `confirm` checks; not for a target.
        **options: The fields of `kvsurgeon.passes.cache.inject.Inject`.

    Raises:
        InputError: The model or its weights cannot be read.
        UnsupportedError: The model cannot be handled soundly.
        ParityError: The results of the model differ from those of the original; nothing was written.
    """
    saving: dict[str, Any] = {
        "folder": folder, "verify": verify, "effort": effort, "seed": seed, "link_weights": link_weights,
        "force": force,
    }  # fmt: skip
    if target is not None:
        if certificate is not None:
            raise UsageError(NO_CERTIFICATE)
        return build_target(source, target, destination, options=options, **saving)
    return run_and_save(source, Pipeline((Inject(**options),)), destination, certificate=certificate, **saving)


def plot(
    source: Source,
    *,
    layer: int = 0,
    prompt: Prompt | None = None,
    against: Source | None = None,
    output: str | Path | None = None,
    folder: str | Path | None = None,
) -> Figure:
    """Return a figure of the keys of a layer: a row for each group of query heads that share a KV head.

    Args:
        source: A file, a folder that holds one, or a model in memory, with or without a cache.
        layer: Index of the attention layer in execution order.
        prompt: A text, or token ids; None for a short text.
        against: A second model on the same scale, such as the result of a pass.
        output: The image file to write; its suffix is the format.
        folder: The folder of the weights and side files of models in memory.

    Raises:
        UsageError: The layer does not exist, the prompt cannot be read, or the image cannot be written.
        InputError: A model cannot be read.
        UnsupportedError: The attention layers cannot be found.
    """
    sources = [one for one in (source, against) if one is not None]
    figure = key_grid.draw_keys([capture_keys(one, layer=layer, prompt=prompt, folder=folder) for one in sources])
    if output is not None:
        key_grid.save_figure(figure, Path(output))
    return figure


def report(
    source: Source,
    output: str | Path | None = None,
    *,
    against: Source | None = None,
    prompt: Prompt | None = None,
    tokens: int = 32,
    verify: bool = False,
    effort: Effort = "normal",
    seed: int | None = None,
    folder: str | Path | None = None,
) -> str:
    """Return an HTML page on a model that needs no network, and write it to `output` if one is given.

    Args:
        source: A file, a folder that holds one, or a model in memory, with or without a cache.
        output: The file to write; it is replaced.
        against: A second model, such as the result of a pass; None for the model with the cache that `inject` adds.
        prompt: A text, or token ids, for attention weights and keys; None for a short text.
        tokens: Number of generated tokens whose time is measured; 0 to run no model.
        verify: Whether to verify the second model against the first one.
        effort: How many texts the verifier compares, and of which lengths.
        seed: Random seed of the texts; None draws one, which the page names.
        folder: The folder of the weights and side files of models in memory.

    Raises:
        UsageError: jinja2 is not installed, or the page cannot be written.
        InputError: A model cannot be read.
        UnsupportedError: A model is not a causal decoder that can be handled soundly.
    """
    page = build_page(
        source, against=against, prompt=prompt, tokens=tokens, verify=verify, effort=effort, seed=seed, folder=folder
    )
    if output is not None:
        with atomic_open(Path(output)) as file:
            file.write(page.encode())
    return page
