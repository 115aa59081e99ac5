"""Attention weights of all layers for a prompt, computed in onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from kvsurgeon import io
from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.heads.counts import counts_of
from kvsurgeon.io.loading import Source
from kvsurgeon.parity.prediction import longest_text, open_decoder, predict
from kvsurgeon.passes.cache.remove_cache import without_cache
from kvsurgeon.passes.contract import Subject
from kvsurgeon.runtime import Array, Tokens
from kvsurgeon.runtime.text import Prompt, load_tokenizer, side_folders
from kvsurgeon.symbolic.sequence_axes import Axes, Length
from kvsurgeon.workflow.prompts import short_prompt

_WEIGHTS_OUTPUT, _AFTER_SOFTMAX = 3, 3  # of `Attention`: index of the output, and `qk_matmul_output_mode`


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """The attention weights of all layers for a prompt.

    Attributes:
        tokens: Text or ID of each token.
        layers: For each layer its weights, `[heads, query, key]`, or why they cannot be shown. Weights on learned rows
            are left out, so that the rest of a query may sum to less than 1.
    """

    tokens: tuple[str, ...]
    layers: tuple[Array | str, ...]


def capture_attention_weights(
    source: Source, *, prompt: Prompt | None = None, folder: str | Path | None = None
) -> AttentionWeights:
    """Return the attention weights of a model for a prompt.

    Args:
        source: A file, a folder with one, or a model in memory; with a cache or without.
        prompt: A text, or token IDs for a model without a tokenizer.
        folder: Folder of the weights and side files of a model in memory.

    Raises:
        UsageError: The prompt cannot be encoded.
        InputError: The model cannot be read.
        UnsupportedError: No attention is found.
        RunError: The model fails.
    """
    subject = without_cache(Subject.of(source, folder))
    analysis, model = subject.analysis(), subject.decomposed().model
    names = [_weights_name(site, layer) for layer, site in enumerate(analysis.sites)]
    with io.staged(model, None, subject.folder) as proto:
        tokens = short_prompt(prompt, load_tokenizer(side_folders(proto, subject.folder)))
        read = [name for name in names if name]
        found, size = _run(_with_weights(proto, analysis), tokens.ids, read, subject.folder)
    layers = (
        _of_layer(analysis, layer, None if name is None else found[name], size) for layer, name in enumerate(names)
    )
    length = tokens.ids.shape[1]
    cropped = (one if isinstance(one, str) else one[:, :length, :length] for one in layers)
    return AttentionWeights(tokens=tokens.texts, layers=tuple(cropped))


def _weights_name(site: AttentionSite, layer: int) -> str | None:
    """Return the name of the value that holds the weights; None if several do."""
    if site.fused is not None:
        return f"kvsurgeon.attention_weights.{layer}"
    values = {product.node.inputs[product.weights] for product in site.products}
    value = values.pop()
    return None if values or value is None else value.name


def _with_weights(model: onnx.ModelProto, analysis: Analysis) -> onnx.ModelProto:
    """Return a copy of a model in which each `Attention` returns its weights."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    fused = {site.at.name: layer for layer, site in enumerate(analysis.sites) if site.fused is not None}
    for node in copy.graph.node:
        layer = fused.get(node.output[0]) if node.output else None
        if layer is not None:
            name = f"kvsurgeon.attention_weights.{layer}"
            node.output.extend([""] * (_WEIGHTS_OUTPUT - len(node.output)))
            node.output.append(name)
            kept = [one for one in node.attribute if one.name != "qk_matmul_output_mode"]
            del node.attribute[:]
            node.attribute.extend(kept)
            node.attribute.append(onnx.helper.make_attribute("qk_matmul_output_mode", _AFTER_SOFTMAX))
    return copy


def _run(model: onnx.ModelProto, tokens: Tokens, names: list[str], folder: Path | None) -> tuple[dict[str, Array], int]:
    """Return some values of a model for a text, and its length: a model of fixed length gets further tokens at the end.

    By causality these do not change the weights of the tokens before them.
    """
    decoder = open_decoder(model, "the model with its attention weights", names, folder, 1)
    length = decoder.length or longest_text(decoder, tokens.shape[1])
    whole = np.pad(tokens[:, :length], ((0, 0), (0, max(length - tokens.shape[1], 0))), mode="edge")
    return predict(decoder, whole, names), whole.shape[1]


def _of_layer(analysis: Analysis, layer: int, array: Array | None, tokens: int) -> Array | str:
    """Return the weights of a layer, `[heads, query, key]`, or why they cannot be shown."""
    if array is None:
        return "several values hold the weights of this layer"
    site = analysis.sites[layer]
    heads = counts_of(analysis.flow, site).heads
    if not np.issubdtype(array.dtype, np.floating):
        return f"the weights are stored as {array.dtype}"
    if site.fused is not None:
        weights: Array | None = array.reshape(-1, *array.shape[-2:])
    else:
        value = site.products[0].node.inputs[site.products[0].weights]
        assert value is not None, "it has a name"
        weights = _by_head(array, analysis.flow.axes.get(value, ()), tokens)
    if weights is None or weights.shape != (heads, tokens, tokens):
        return f"expected weights of {heads} heads, found {list(array.shape)}"
    return weights.astype(np.float32)


def _by_head(array: Array, axes: Axes, tokens: int) -> Array | None:
    """Return weights as `[heads, query, key]`; None if query and key cannot be distinguished."""
    by_place = {axis.axis: axis for axis in axes}
    shape: list[int] = []
    places: dict[Length | None, int] = {}
    rows_before = 0
    for place, size in enumerate(array.shape):
        axis = by_place.get(place)
        if axis is None:
            shape.append(size)
            continue
        length, inner = tokens + axis.learned_rows, axis.inner
        if not isinstance(inner, int) or axis.most is not None or size % (length * inner):
            return None
        role = axis.variable.resolved()
        places[role] = len(shape) + 1
        shape += [size // (length * inner), length, inner]
        rows_before = axis.rows_before if role is Length.TOTAL else rows_before
    if set(places) != {Length.NEW, Length.TOTAL}:
        return None
    moved = np.moveaxis(array.reshape(shape), (places[Length.NEW], places[Length.TOTAL]), (-2, -1))
    by_head = moved.reshape(-1, *moved.shape[-2:])
    return by_head[..., rows_before : rows_before + tokens]
