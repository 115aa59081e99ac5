"""transformers.js: `AutoModelForSeq2SeqLM` and `AutoModelForSpeechSeq2Seq.from_pretrained(folder)`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvsurgeon.passes.cache.cross_attention_branch import CHOICE
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.interface.integer_inputs import Int64Inputs
from kvsurgeon.targets.hugging_face_files import check_model_type, with_unknown_tokens
from kvsurgeon.targets.model_info import ModelInfo
from kvsurgeon.targets.parts import HIDDEN, MASK, USUAL_NAMES, check_encoder, check_layers
from kvsurgeon.targets.target import ENCODER, Incompatibility, Target
from kvsurgeon.targets.transformers_js import data_files_of_parts, own_config

# Source: getNormalizedConfig (src/configs.js) and the models of Seq2Seq (src/models/registry.js) of version 4.3.2. It
# looks for one cache per layer of the config, and the name of that number depends on the model type.
_LAYERS = {
    **dict.fromkeys(("t5", "mt5", "longt5"), "num_decoder_layers"),
    **dict.fromkeys(("bart", "mbart", "marian", "m2m_100", "blenderbot", "blenderbot-small"), "decoder_layers"),
}
_SPEECH_LAYERS = {"whisper": "decoder_layers", "lite-whisper": "decoder_layers", "speecht5": "decoder_layers",
                  "moonshine": "decoder_num_hidden_layers"}  # fmt: skip
_FALLBACK = ("bart", "BartForConditionalGeneration")  # in place of any other model type of texts
_IDS = ("input_ids", "attention_mask", MASK)
_TEXT, _AUDIO = frozenset(("input_ids", "attention_mask")), frozenset(("input_features", "input_values"))


def transformers_js_seq2seq_config(model: ModelInfo) -> Mapping[str, Any]:
    """Return a `config.json` by which transformers.js finds the caches and the data files."""
    own = own_config(model.config, data_files_of_parts(model))
    config = {**model.config, **own, "is_encoder_decoder": True}
    if _is_known(model) or _takes_audio(model):
        return config
    if "model_type" in config:
        config.setdefault("original_model_type", config["model_type"])
    kind, architecture = _FALLBACK
    heads = model.kv_heads[0]
    config |= {
        "model_type": kind,
        "architectures": [architecture],
        "decoder_layers": model.layers,
        "decoder_attention_heads": heads,
        "encoder_attention_heads": heads,
        "d_model": heads * model.head_dims[0],
    }
    return with_unknown_tokens(config)


def _is_known(model: ModelInfo) -> bool:
    """Return whether transformers.js counts as many caches as there are, or more."""
    layers = (_SPEECH_LAYERS if _takes_audio(model) else _LAYERS).get(model.config.get("model_type", ""))
    return layers is not None and model.config.get(layers, 0) >= model.layers


def _takes_audio(model: ModelInfo) -> bool:
    return ENCODER in model.parts and bool(_AUDIO & set(model.parts[ENCODER].input_names))


def _check(model: ModelInfo) -> Iterator[Incompatibility]:
    yield from check_layers(model)
    yield from check_encoder(model, _TEXT | _AUDIO)
    if _takes_audio(model) and not _is_known(model):
        yield Incompatibility(
            f"expected a model type of {', '.join(sorted(_SPEECH_LAYERS))}, by which transformers.js counts caches and "
            f"processes audio, found {model.config.get('model_type', 'none')}",
            at="config.json",
        )
        return
    config = transformers_js_seq2seq_config(model) if model.cache else {}
    yield from check_model_type(model, config, "transformers.js counts caches by the model type")
    tensors = (*(pair.past for pair in model.cache), *model.cross_attention)
    other = next((one for one in tensors if one.dims[0] not in ("batch_size", 1)), None)
    if other is not None:
        yield Incompatibility(f"expected batch axis 1 or batch_size, found {other.dims[0]}", at=other.name)
    for tensor in model.parts[ENCODER].inputs if ENCODER in model.parts else ():
        if tensor.name in _TEXT and tensor.dtype != "int64":
            yield Incompatibility(f"encoder: expected int64, found {tensor.dtype}", at=tensor.name)


TRANSFORMERS_JS_SEQ2SEQ = Target(
    name="transformers-js-seq2seq",
    summary="AutoModelForSeq2SeqLM or AutoModelForSpeechSeq2Seq.from_pretrained(folder) of @huggingface/transformers",
    tested_with="@huggingface/transformers 4.3.2 in Node with onnxruntime-node",
    before=(USUAL_NAMES,),
    cache=Inject(cross_attention="first-call"),
    after=(Int64Inputs(),),
    file="onnx/decoder_model_merged.onnx",
    parts={ENCODER: "onnx/encoder_model.onnx"},
    data="{file}_data",
    required=("input_ids", HIDDEN, "logits"),
    allowed_inputs=frozenset((*_IDS, HIDDEN, CHOICE)),
    dtypes={name: {"int64"} for name in _IDS} | {"logits": {"float32", "float16"}},
    cache_dtypes={"float32", "float16"},
    static_axes=(1, 3),
    required_files=("tokenizer.json", "tokenizer_config.json"),
    side_files={"config.json": transformers_js_seq2seq_config},
    checks=(_check,),
)
