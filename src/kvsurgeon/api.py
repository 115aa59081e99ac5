"""The Python API. A model is a path, bytes, an `onnx.ModelProto`, an `onnx_ir.Model` or an `onnx_graphsurgeon.Graph`.

Functions do not change a model that they are given, except an `onnx_ir.Model`, which passes edit in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, get_type_hints

from kvsurgeon import io
from kvsurgeon.anatomy import Attention, Decoder
from kvsurgeon.errors import UsageError, did_you_mean
from kvsurgeon.io import load
from kvsurgeon.io.loading import Source, as_runnable
from kvsurgeon.io.progress import OnProgress
from kvsurgeon.parity import AccuracyLoss, Effort, Progress, Report
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import RemoveCache
from kvsurgeon.passes.cache.retarget import Retarget
from kvsurgeon.passes.contract import Pass, Subject
from kvsurgeon.passes.options import check_count, describe, is_value, make
from kvsurgeon.reporting import key_grid
from kvsurgeon.reporting.page.build import build_page
from kvsurgeon.runtime import GeneratedToken, Generation, Sampling, TextGenerator
from kvsurgeon.runtime.providers import CPU
from kvsurgeon.runtime.text import Prompt
from kvsurgeon.targets import Target
from kvsurgeon.workflow import loss, verification
from kvsurgeon.workflow.build_target import build_target
from kvsurgeon.workflow.certificate import NO_CERTIFICATE
from kvsurgeon.workflow.confirmation import confirm
from kvsurgeon.workflow.keys import capture_keys
from kvsurgeon.workflow.pipeline import Pipeline, PipelineRun
from kvsurgeon.workflow.replication import replicate_kv_heads
from kvsurgeon.workflow.run_and_save import run_and_save

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tokenizers import Tokenizer

__all__ = [
    "Pipeline",
    "Sampling",
    "confirm",
    "find_attention",
    "generate",
    "inject",
    "inspect",
    "load",
    "measure_loss",
    "plot",
    "remove_cache",
    "replicate_kv_heads",
    "report",
    "retarget",
    "run",
    "save",
    "verify",
]


class RunOptions(TypedDict, total=False):
    """Options of all functions that run passes.

    Attributes:
        folder: The folder of the external data and the side files of a model in memory.
        verify: Whether to verify the result against the original, which needs the weights; by default it is.
        effort: How many texts the verifier compares, and of which lengths: "quick", "normal" or "thorough".
        seed: Random seed of the texts; None draws one, which the report names.
        link_weights: Whether to link external data into another folder instead of copying it; see `save`.
        pack: Whether to write all weights to one new data file; see `save`.
        force: Whether to replace data files and side files of other content; see `save`.
        progress: Called by the verifier before each scenario, with its number, their number and its name.
    """

    folder: str | Path | None
    verify: bool
    effort: Effort
    seed: int | None
    link_weights: bool
    pack: bool
    force: bool
    progress: Progress | None


def save(
    model: Source,
    destination: str | Path,
    *,
    source: str | Path | None = None,
    link_weights: bool = False,
    pack: bool = False,
    force: bool = False,
    progress: OnProgress | None = None,
) -> Path:
    """Save a model with its weights and side files, and return its path.

    All files are written first and named last: a killed process leaves the old model or the new one, complete.

    Args:
        model: The model.
        destination: An .onnx file, or a folder, in which the model gets the file name of its source.
        source: The file or folder of the original model, whose side files are copied; None for that of `load`.
        link_weights: Whether to make hard links to data files instead of copies, which onnxruntime reads, and
            `onnx.load` (1.21 or later) rejects.
        pack: Whether to write all weights to one new file, without unused ones.
        force: Whether to replace data files and side files of other content.
        progress: Called with the file name, bytes done and bytes in total; by default a bar on a terminal.

    Raises:
        UsageError: The destination cannot be written to, or has another file under the name of one of this model's.
        WeightsError: External data is missing.
    """
    loaded = load(model, folder=_folder_of(source))
    return io.save(
        loaded, destination, source=source, link_weights=link_weights, pack=pack, force=force, progress=progress
    )


def inspect(source: Source, *, folder: str | Path | None = None) -> Decoder:
    """Return the facts about a decoder: its attention layers, its cache, and what was proved and assumed.

    Args:
        source: The model, which is not changed.
        folder: The folder of the external data of a model in memory.

    Raises:
        InputError: The model cannot be read.
        UnsupportedError: The model is not a causal decoder that can be handled soundly.
    """
    return Subject.of(source, folder).decoder()


def find_attention(source: Source, *, folder: str | Path | None = None) -> tuple[Attention, ...]:
    """Return the attention layers of a decoder in execution order.

    Args:
        source: The model, which is not changed.
        folder: The folder of the external data of a model in memory.

    Raises:
        InputError: The model cannot be read.
        UnsupportedError: The model is not a causal decoder that can be handled soundly.
    """
    return inspect(source, folder=folder).attentions


def run(
    source: Source,
    passes: str | Pass | Callable[..., Any] | Iterable[Pass | Callable[..., Any]],
    destination: str | Path | None = None,
    *,
    text: str | Path | None = None,
    per_layer: bool = False,
    max_loss: float | None = None,
    certificate: str | Path | None = None,
    **options: Unpack[RunOptions],
) -> PipelineRun:
    """Run passes in order, verify the result, and write it to `destination` if one is given.

    Args:
        source: The model.
        passes: Passes as a text such as "inject,fix-shapes{tokens=1}", a pass or function, or several of these.
        destination: An .onnx file or a folder, which may be the source itself.
        text: A text file: passes are calibrated on its first half, and the loss of those that are not exact is measured
            on the second. None to calibrate none, and measure on a built-in text.
        per_layer: Whether to measure the loss of each attention layer too.
        max_loss: Largest loss that is allowed, in nats of KL divergence per token; None for any.
        certificate: A file to write the certificate of the result to, which `confirm` checks.
        **options: See `RunOptions`.

    Raises:
        UsageError: A pass or an option is unknown.
        InputError: The model or its weights cannot be read.
        UnsupportedError: A pass does not support the model, or no pass changed it.
        ParityError: The results of the model differ from those of the original; nothing was written.
        LossError: The loss is above `max_loss`; nothing was written.
    """
    _check_options(options)
    if isinstance(passes, str):
        pipeline = Pipeline.parse(passes)
    else:
        pipeline = Pipeline(passes if isinstance(passes, Iterable) else (passes,))
    return run_and_save(
        source, pipeline, destination, text=text, per_layer=per_layer, max_loss=max_loss, certificate=certificate,
        **options,
    )  # fmt: skip


def inject(
    source: Source,
    destination: str | Path | None = None,
    *,
    target: Target | str | None = None,
    certificate: str | Path | None = None,
    **options: Any,
) -> PipelineRun:
    """Inject a KV cache, verify the result, and write it to `destination` if one is given.

    Args:
        source: The model.
        destination: An .onnx file or a folder, which may be the source itself.
        target: The runtime or compiler that loads the result, or its name; `destination` is then the folder that it
            loads, side files included.
        certificate: A file to write the certificate of the result to, which `confirm` checks; not for a target.
        **options: Those of `RunOptions`, and the fields of `kvsurgeon.passes.cache.inject.Inject`.

    Raises:
        UsageError: An option is unknown or has an invalid value.
        InputError: The model or its weights cannot be read.
        UnsupportedError: The model cannot be handled soundly.
        ParityError: The results of the model differ from those of the original; nothing was written.
    """
    shared, fields = _divided(options)
    _check_options(shared)
    wanted = make(Inject, Inject.name, fields)
    if target is None:
        return run(source, wanted, destination, certificate=certificate, **shared)
    if certificate is not None:
        raise UsageError(NO_CERTIFICATE)
    return build_target(source, target, destination, options=fields, **shared)


def retarget(source: Source, destination: str | Path | None = None, **options: Any) -> PipelineRun:
    """Change the cache of a model: its names, cache mode, layout or element type.

    Args:
        source: The model, with a cache.
        destination: An .onnx file or a folder, which may be the source itself.
        **options: Those of `RunOptions`, and the fields of `kvsurgeon.passes.cache.retarget.Retarget`.

    Raises:
        UsageError: An option is unknown or has an invalid value.
        UnsupportedError: The model has no cache, or one that cannot be removed.
        ParityError: The results of the model differ from those of the original; nothing was written.
    """
    shared, fields = _divided(options)
    return run(source, make(Retarget, Retarget.name, fields), destination, **shared)


def remove_cache(source: Source, destination: str | Path | None = None, **options: Unpack[RunOptions]) -> PipelineRun:
    """Remove the cache inputs and outputs: the model then computes whole sequences.

    Args:
        source: The model, with a cache.
        destination: An .onnx file or a folder, which may be the source itself.
        **options: See `RunOptions`.

    Raises:
        UnsupportedError: The model has no cache, or one that cannot be removed.
        ParityError: The results of the model differ from those of the original; nothing was written.
    """
    return run(source, RemoveCache(), destination, **options)


def verify(
    reference: Source,
    candidate: Source,
    *,
    folder: str | Path | None = None,
    effort: Effort = "normal",
    seed: int | None = None,
    threads: int | None = None,
    provider: str = CPU,
    progress: Progress | None = None,
) -> Report:
    """Run two models on the same texts, whole and in chunks, and compare all outputs and the cache.

    Args:
        reference: The model before a change.
        candidate: The model after it, with a cache or without.
        folder: The folder of the external data of models in memory.
        effort: How many texts, and of which lengths: "quick", "normal" or "thorough".
        seed: Random seed of the texts; None draws one, which the report names.
        threads: Number of threads per operator.
        provider: Execution provider of onnxruntime for the candidate, such as "cuda" or "cuda{device_id=1}".
        progress: Called before each scenario, with its number, their number and its name.

    Returns:
        A report; a difference is returned, not raised.

    Raises:
        UsageError: The installed onnxruntime has no such provider.
        InputError: A model cannot be read.
    """
    _check_options({"effort": effort, "seed": seed})
    models, where = as_runnable((reference, candidate), folder)
    return verification.verify_models(
        *models, folder=where, effort=effort, seed=seed, threads=threads, provider=provider, progress=progress
    )


def measure_loss(
    reference: Source,
    candidate: Source,
    *,
    text: str | Path | None = None,
    per_layer: bool = False,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> AccuracyLoss:
    """Measure the accuracy loss of a candidate model on a text.

    Args:
        reference: The model before the passes.
        candidate: The model after them.
        text: A text file; None for a built-in one. Without a tokenizer next to the reference, random token IDs are
            used.
        per_layer: Whether to measure the error of each attention output too.
        folder: The folder of the weights and side files of models in memory.
        progress: Called before each window of the text.

    Raises:
        InputError: A model or the text cannot be read.
        UnsupportedError: `per_layer` is true and attention is not found.
        ParityError: The candidate's logits differ if its cache is used, or are not numbers.
    """
    models, where = as_runnable((reference, candidate), folder)
    return loss.measure_loss(*models, text=text, per_layer=per_layer, folder=where, progress=progress)


def generate(
    model: Source,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    cached: bool | None = None,
    tokenizer: Tokenizer | None = None,
    stop: Collection[int] | None = None,
    folder: str | Path | None = None,
    threads: int | None = None,
    provider: str = CPU,
    on_token: Callable[[GeneratedToken], None] | None = None,
) -> Generation:
    """Continue one prompt or several.

    Args:
        model: The model, with a cache or without.
        prompts: A text, token IDs, or a sequence of these.
        max_new_tokens: Maximum number of tokens for each prompt.
        sampling: How tokens are chosen; None for greedy decoding.
        cached: Whether to use the cache; None if the model has one.
        tokenizer: The tokenizer; None for the `tokenizer.json` next to the model.
        stop: Tokens that end a text; None for those of `generation_config.json` or `config.json`.
        folder: The folder of the weights and side files of a model in memory.
        threads: Number of threads per operator.
        provider: Execution provider of onnxruntime, such as "cuda" or "cuda{device_id=1}".
        on_token: Called with each token.

    Raises:
        InputError: The model or a side file cannot be read.
        UsageError: The model cannot continue such prompts.
        RunError: The model fails on them.
    """
    check_count("max_new_tokens", max_new_tokens)
    (opened,), where = as_runnable((model,), folder)
    generator = TextGenerator(
        opened, cached=cached, tokenizer=tokenizer, stop=stop, folder=where, threads=threads, provider=provider
    )
    return generator.generate(prompts, max_new_tokens=max_new_tokens, sampling=sampling, on_token=on_token)


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
        source: The model, with a cache or without.
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
        source: The model, with a cache or without.
        output: The `.html` file to write; it is replaced.
        against: A second model, such as the result of a pass; None for the model with the cache that `inject` adds.
        prompt: A text, or token ids, for attention weights and keys; None for a short text.
        tokens: Number of generated tokens whose time is measured; 0 to run no model.
        verify: Whether to verify the second model against the first one.
        effort: How many texts the verifier compares, and of which lengths.
        seed: Random seed of the texts; None draws one, which the page names.
        folder: The folder of the weights and side files of models in memory.

    Raises:
        UsageError: jinja2 is not installed, or the page cannot be written there.
        InputError: A model cannot be read.
        UnsupportedError: A model is not a causal decoder that can be handled soundly.
    """
    return build_page(
        source, output, against=against, prompt=prompt, tokens=tokens, verify=verify, effort=effort, seed=seed,
        folder=folder,
    )  # fmt: skip


def _check_options(options: Mapping[str, Any]) -> None:
    """Check options of `RunOptions`.

    Raises:
        UsageError: One is unknown, or has an invalid value.
    """
    types = get_type_hints(RunOptions)
    for name, value in options.items():
        if name not in types:
            raise UsageError(f"unknown option {name}; {did_you_mean(name, types)}")
        if not is_value(value, types[name]):
            raise UsageError(f"option {name}: expected {describe(types[name])}, found {value!r}")
    check_count("seed", options.get("seed"), least=0)


def _divided(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return those of `RunOptions`, and the others."""
    shared = {name: value for name, value in options.items() if name in RunOptions.__annotations__}
    return shared, {name: value for name, value in options.items() if name not in shared}


def _folder_of(source: str | Path | None) -> Path | None:
    path = None if source is None else Path(source)
    return path.parent if path is not None and path.is_file() else path
