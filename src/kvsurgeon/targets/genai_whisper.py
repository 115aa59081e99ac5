"""onnxruntime-genai: `og.Model(folder)` of type whisper, whose encoder computes the keys of cross-attention too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.interface.integer_inputs import Int32Inputs
from kvsurgeon.targets.genai import DEFAULT_LENGTH, FLOATS, check_end_token, special_tokens
from kvsurgeon.targets.model_info import ModelInfo
from kvsurgeon.targets.parts import OUTPUT, USUAL_NAMES, check_encoder, check_layers, check_shapes
from kvsurgeon.targets.target import ENCODER, Incompatibility, Target

_AUDIO = "input_features"
_ENCODER, _DECODER = "encoder.onnx", "decoder.onnx"


def genai_whisper_config(model: ModelInfo) -> Mapping[str, Any]:
    """Return `genai_config.json`: names and sizes from the graphs, special tokens and lengths from the config."""
    length = model.max_length or DEFAULT_LENGTH
    sizes = {
        "session_options": {"provider_options": []},
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.kv_heads[0],
        "num_key_value_heads": model.kv_heads[0],
        "head_size": model.head_dims[0],
        "hidden_size": model.kv_heads[0] * model.head_dims[0],
    }
    encoder = {
        "inputs": {"audio_features": _AUDIO},
        "outputs": {"encoder_hidden_states": OUTPUT, **_names("cross_present", "present.%d.encoder")},
    }
    decoder = {
        "inputs": {
            "input_ids": "input_ids",
            **_names("past", "past_key_values.%d.decoder"),
            **_names("cross_past", "past_key_values.%d.encoder"),
        },
        "outputs": {"logits": "logits", **_names("present", "present.%d.decoder")},
    }
    return {
        "model": {
            "type": "whisper",
            "vocab_size": model.vocab_size,
            "context_length": length,
            **special_tokens(model),
            "encoder": {"filename": _ENCODER, **sizes, **encoder},
            "decoder": {"filename": _DECODER, **sizes, **decoder},
        },
        "search": {"max_length": length, "past_present_share_buffer": False, "num_beams": 1},
    }


def _names(what: str, template: str) -> dict[str, str]:
    return {f"{what}_{kind}_names": f"{template}.{kind}" for kind in ("key", "value")}


def _check(model: ModelInfo) -> Iterator[Incompatibility]:
    if model.vocab_size is None:
        yield Incompatibility("expected a fixed size for the vocabulary, found none", at="logits")
    yield from check_layers(model)
    yield from check_shapes(model)
    yield from check_encoder(model, frozenset((_AUDIO,)))
    yield from check_end_token(model)


GENAI_WHISPER = Target(
    name="genai-whisper",
    summary="onnxruntime_genai.Model(folder) of onnxruntime-genai, type whisper",
    tested_with="onnxruntime-genai 0.18.0",
    before=(USUAL_NAMES,),
    cache=Inject(cross_attention="separate"),
    after=(Int32Inputs(),),
    file=_DECODER,
    parts={ENCODER: _ENCODER},
    allowed_inputs=frozenset(("input_ids",)),
    dtypes={"input_ids": {"int32"}, "logits": FLOATS},
    cache_dtypes=FLOATS,
    static_axes=(1, 3),
    uniform=True,
    required_files=("tokenizer.json", "tokenizer_config.json"),
    side_files={"genai_config.json": genai_whisper_config},
    checks=(_check,),
)
