"""onnxruntime-genai: `og.Model(folder)`, which reads the names of inputs and outputs from `genai_config.json`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from kvsurgeon.cache.pairs import find_cache_pairs
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.window_cache import WindowCache
from kvsurgeon.passes.interface.name_states import NameStates
from kvsurgeon.passes.operators.optimize import Optimize
from kvsurgeon.targets.model_info import ModelInfo
from kvsurgeon.targets.parts import check_embedding
from kvsurgeon.targets.target import EMBEDDING, EMBEDDINGS, Incompatibility, Target, warning

_OF_ALL_TOKENS = ("attention_mask", "position_ids")
_INPUTS = ("input_ids", *_OF_ALL_TOKENS)
_MODEL, _PIPELINE_EMBEDDING = "model.onnx", "embedding.onnx"
_IDS = {"int64", "int32"}
FLOATS = {"float32", "float16", "bfloat16"}
_STATES = NameStates(after_attention=True)
_DEFAULT_EOS = 0  # as in onnxruntime-genai
DEFAULT_LENGTH = 4096  # tokens


def genai_config(model: ModelInfo, *, shared_buffer: bool = False) -> Mapping[str, Any]:
    """Return `genai_config.json`: names and sizes from the graph, special tokens and lengths from the config.

    Args:
        model: The model.
        shared_buffer: Whether past and present are one buffer.
    """
    is_pipeline = EMBEDDING in model.parts
    inputs = {name: name for name in _INPUTS if name in model.input_names or (is_pipeline and name == "input_ids")}
    outputs = {"logits": "logits"}
    for pair in (*model.cache, *model.states):
        kind = pair.kind.removesuffix("_state")
        inputs[f"past_{kind}_names"] = re.sub(r"\d+", "%d", pair.past.name, count=1)
        outputs[f"present_{kind}_names"] = re.sub(r"\d+", "%d", pair.present.name, count=1)
    only_windows = {state.kind for state in model.states} == {"conv_state"}
    kv_heads = model.kv_heads or (1,)
    length = model.max_length or DEFAULT_LENGTH
    return {
        "model": {
            "type": "decoder-pipeline" if is_pipeline else "lfm2" if only_windows else "decoder",
            "vocab_size": model.vocab_size,
            "context_length": length,
            **special_tokens(model),
            "decoder": {
                **({"pipeline": _pipeline(model)} if is_pipeline else {"filename": _MODEL}),
                "session_options": {"provider_options": []},
                "num_hidden_layers": len({pair.layer for pair in (*model.cache, *model.states)}),
                "num_attention_heads": model.query_heads or max(kv_heads),
                "num_key_value_heads": kv_heads[0],
                "head_size": next(iter(model.head_dims), 1),
                "inputs": inputs,
                "outputs": outputs,
                **(_layer_types(model) if only_windows else {}),
                **_sliding_window(model),
            },
        },
        "search": {"max_length": length, "past_present_share_buffer": shared_buffer, "num_beams": 1},
    }


def _pipeline(model: ModelInfo) -> list[Mapping[str, Any]]:
    """Return the sessions of each call: the embedding of the new tokens, then the decoder."""
    pairs = model.cache
    inputs = [*model.input_names, *(pair.past.name for pair in pairs)]
    outputs = ["logits", *(pair.present.name for pair in pairs)]
    return [
        {"embedding": {"filename": _PIPELINE_EMBEDDING, "inputs": ["input_ids"], "outputs": [EMBEDDINGS]}},
        {"decoder": {"filename": _MODEL, "inputs": inputs, "outputs": outputs}},
    ]


def _layer_types(model: ModelInfo) -> dict[str, Any]:
    """Return the layers of a model with conv_states, which are numbered after those of attention."""
    types = ["full_attention"] * model.layers + ["conv"] * len(model.states)
    return {"layer_types": types, "conv_cache_size": model.states[0].past.dims[-1]}


def _sliding_window(model: ModelInfo) -> dict[str, Any]:
    """Return the layers whose buffers hold the rows of a window, to which onnxruntime-genai adds 16."""
    rows = _window_rows(model)
    layers = [pair.layer for pair in model.cache if pair.kind == "key" and pair.past.name in rows]
    if not layers:
        return {}
    slides = {"slide_key_value_cache": False, "slide_inputs": False}  # the operator drops rows, and reads all inputs
    return {"sliding_window": {"window_size": max(rows.values()), "layers": layers, **slides}}


def _window_rows(model: ModelInfo) -> dict[str | None, int]:
    """Return the rows of buffers that hold those of a window, by the name of the input."""
    pairs = () if model.graph is None else find_cache_pairs(model.graph)
    return {pair.past.name: pair.window.most for pair in pairs if pair.window is not None}


def special_tokens(model: ModelInfo) -> dict[str, Any]:
    """Return the special tokens of `genai_config.json`."""
    bos, eos, pad = (_tokens(model, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    eos = eos or [_DEFAULT_EOS]
    tokens = {"bos_token_id": bos[:1], "eos_token_id": eos, "pad_token_id": (pad or eos)[:1]}
    return {name: ids if len(ids) > 1 else ids[0] for name, ids in tokens.items() if ids}


def check_end_token(model: ModelInfo) -> Iterator[Incompatibility]:
    """Warn if the config has no end token, which onnxruntime-genai requires."""
    if not _tokens(model, "eos_token_id"):
        yield warning(
            f"the config has no eos_token_id in the vocabulary: genai_config.json has {_DEFAULT_EOS}",
            at="genai_config.json",
        )


def _tokens(model: ModelInfo, name: str) -> list[int]:
    """Return the token ids of a config key that are in the vocabulary: the client rejects a folder with others."""
    value = model.config.get(name)
    ids = value if isinstance(value, list) else [value]
    return [token for token in ids if isinstance(token, int) and 0 <= token < (model.vocab_size or 0)]


def _check(model: ModelInfo) -> Iterator[Incompatibility]:
    if model.vocab_size is None:
        yield Incompatibility("expected a fixed size for the vocabulary, found none", at="logits")
    if {pair.kind for pair in model.cache} not in ({"key", "value"}, set()):
        yield Incompatibility("expected a key and a value of each layer, found one tensor for both")
    shapes: dict[int, Any] = {}
    for pair in model.cache:
        shape = shapes.setdefault(pair.layer, pair.past.dims)
        if shape != pair.past.dims:
            yield Incompatibility(
                f"expected keys and values of one shape, found {list(shape)} and {list(pair.past.dims)}",
                at=pair.past.name,
            )
            return
    if len({tensor.dtype for tensor in model.inputs if tensor.name in _OF_ALL_TOKENS}) > 1:
        yield Incompatibility("expected attention_mask and position_ids of one type, found int64 and int32")
    for tensor in model.inputs:
        if tensor.name in _OF_ALL_TOKENS and len(tensor.dims) != 2:
            yield Incompatibility(f"expected [batch, sequence], found {list(tensor.dims)}", at=tensor.name)
    if model.max_length is None:
        yield warning(
            f"neither graph nor config limit the length of a text: genai_config.json has {DEFAULT_LENGTH}",
            at="genai_config.json",
        )
    if "position_ids" not in model.input_names:
        yield warning(
            "the model has no input position_ids: padding, which is on the right here, shifts the positions "
            "that it counts",
            hint="run add-position-ids first",
        )
    yield from check_end_token(model)


def _check_states(model: ModelInfo) -> Iterator[Incompatibility]:
    """Yield what RecurrentState of onnxruntime-genai does not keep: it takes pairs of one conv_state and one other."""
    if model.states:
        yield warning("padding, which is on the right here, enters a state: all texts of a batch must have one length")
    shapes: dict[str, set[Any]] = {}
    layers: dict[str, set[int]] = {}
    for state in model.states:
        shapes.setdefault(state.kind, set()).add(state.past.dims)
        layers.setdefault(state.kind, set()).add(state.layer)
    recurrent = layers.get("recurrent_state")
    if recurrent and recurrent != layers.get("conv_state"):
        yield Incompatibility(
            f"expected a conv_state of each recurrent_state, found {len(layers.get('conv_state', ()))} of "
            f"{len(recurrent)}", at=model.states[-1].past.name,
        )  # fmt: skip
    for kind, found in shapes.items():
        if len(found) > 1:
            shape, other, *_ = (list(dims) for dims in found)
            yield Incompatibility(f"expected each {kind} of one shape, found {shape} and {other}")
    if any(len(shape) != 4 for shape in shapes.get("recurrent_state", ())):
        yield Incompatibility("expected a recurrent_state of four axes", at=model.states[-1].past.name)


def _check_windows(model: ModelInfo) -> Iterator[Incompatibility]:
    """Yield the least `max_length`: onnxruntime-genai allocates no more rows, and operators need a window."""
    most, length = max(_window_rows(model).values(), default=0), model.max_length or DEFAULT_LENGTH
    if most:
        yield Incompatibility(
            f"a text needs a max_length of at least {most}, the rows of a window, found {length}",
            at="genai_config.json", hint="use genai-shared-buffer for less", blocking=length < most,
        )  # fmt: skip


GENAI = Target(
    name="genai",
    summary="onnxruntime_genai.Model(folder) of onnxruntime-genai",
    tested_with="onnxruntime-genai 0.18.0",
    after=(_STATES,),
    allowed_inputs=frozenset(_INPUTS),
    states={"conv_state", "recurrent_state"},
    dtypes={name: _IDS for name in _INPUTS} | {"logits": FLOATS},
    cache_dtypes=FLOATS,
    static_axes=(1, 3),
    required_files=("tokenizer.json", "tokenizer_config.json"),
    side_files={"genai_config.json": genai_config},
    checks=(_check, _check_states),
)

# GroupQueryAttention writes into the buffer, and derives the number of valid rows from the attention mask.
GENAI_SHARED_BUFFER = replace(
    GENAI,
    name="genai-shared-buffer",
    summary="onnxruntime_genai.Model(folder) of onnxruntime-genai, past and present in one buffer",
    cache=Inject(cache="static", past_length="mask"),
    after=(Optimize(layers="all", padding="lengths"), _STATES),
    side_files={"genai_config.json": partial(genai_config, shared_buffer=True)},
)

GENAI_SLIDING_WINDOW = replace(
    GENAI_SHARED_BUFFER,
    name="genai-sliding-window",
    summary=f"{GENAI_SHARED_BUFFER.summary}, of the rows of a window where a layer has one",
    after=(*GENAI_SHARED_BUFFER.after, WindowCache()),
    checks=(*GENAI_SHARED_BUFFER.checks, _check_windows),
)

GENAI_PIPELINE = replace(
    GENAI,
    name="genai-pipeline",
    summary="onnxruntime_genai.Model(folder) of onnxruntime-genai, type decoder-pipeline, for decoders of embeddings",
    parts={EMBEDDING: _PIPELINE_EMBEDDING},
    required=(EMBEDDINGS, "logits"),
    allowed_inputs=frozenset((EMBEDDINGS, *_OF_ALL_TOKENS)),
    states=frozenset(),
    dtypes={**GENAI.dtypes, EMBEDDINGS: FLOATS},
    checks=(_check, partial(check_embedding, ids=_IDS)),
)
