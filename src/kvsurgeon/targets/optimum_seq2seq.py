"""optimum: `ORTModelForSeq2SeqLM` and `ORTModelForSpeechSeq2Seq.from_pretrained(folder)`, with a merged decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvsurgeon.passes.cache.cross_attention_branch import CHOICE
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.targets.hugging_face_files import tokenizer_config_before_5
from kvsurgeon.targets.model_info import ModelInfo
from kvsurgeon.targets.parts import HIDDEN, MASK, USUAL_NAMES, check_encoder, check_layers, check_shapes
from kvsurgeon.targets.target import ENCODER, Incompatibility, Target, warning

_IDS = ("input_ids", "attention_mask", MASK)
_ENCODER_INPUTS = frozenset(("input_ids", "attention_mask", "input_features", "input_values"))

# Source: ORTDecoderForSeq2Seq.__init__ of optimum-onnx 0.1.0: the shape of empty caches is `num_attention_heads` and
# `hidden_size // num_attention_heads` of the config, which configs call by one of these names.
_HEADS = ("num_attention_heads", "encoder_attention_heads", "num_heads", "encoder_num_attention_heads")
_HIDDEN = ("hidden_size", "d_model")


def optimum_seq2seq_config(model: ModelInfo) -> Mapping[str, Any]:
    """Return a `config.json` from which optimum derives the shape of the cache in the graph.

    Sizes that give another shape are replaced; `original_...` keeps them.
    """
    config = {**model.config, "use_cache": True, "is_encoder_decoder": True}
    for key, size in _sizes(model).items():
        if config.get(key) != size:
            config |= {f"original_{key}": config.get(key), key: size}
    return config


def _sizes(model: ModelInfo) -> dict[str, int]:
    """Return the sizes in the config that optimum derives the shape from, as the graph has them."""
    if len(model.kv_heads) != 1 or len(model.head_dims) != 1:
        return {}
    heads, hidden = (next((name for name in names if name in model.config), None) for names in (_HEADS, _HIDDEN))
    if heads is None or hidden is None:
        return {}
    return {heads: model.kv_heads[0], hidden: model.kv_heads[0] * model.head_dims[0]}


def _check(model: ModelInfo) -> Iterator[Incompatibility]:
    yield from check_layers(model)
    yield from check_shapes(model)
    yield from check_encoder(model, _ENCODER_INPUTS)
    sizes = _sizes(model)
    if not sizes:
        yield Incompatibility(
            f"expected {' or '.join(_HEADS)}, and {' or '.join(_HIDDEN)} in the config, from which optimum derives the "
            "shape of empty caches",
            at="config.json",
        )
    replaced = [f"{key} {model.config[key]} by {size}" for key, size in sizes.items() if model.config[key] != size]
    if replaced:
        yield warning(
            f"optimum derives the shape of empty caches from the config: replaced {' and '.join(replaced)}",
            at="config.json",
        )


OPTIMUM_SEQ2SEQ = Target(
    name="optimum-seq2seq",
    summary="ORTModelForSeq2SeqLM or ORTModelForSpeechSeq2Seq.from_pretrained(folder) of optimum",
    tested_with="optimum-onnx 0.1.0 with transformers 4.57",
    before=(USUAL_NAMES,),
    cache=Inject(cross_attention="first-call"),
    file="decoder_model_merged.onnx",
    parts={ENCODER: "encoder_model.onnx"},
    required=("input_ids", HIDDEN, "logits"),
    allowed_inputs=frozenset((*_IDS, HIDDEN, CHOICE)),
    dtypes={name: {"int64", "int32"} for name in _IDS},
    cache_dtypes={"float32", "float16"},
    static_axes=(1, 3),
    uniform=True,
    side_files={"config.json": optimum_seq2seq_config, "tokenizer_config.json": tokenizer_config_before_5},
    checks=(_check,),
)
