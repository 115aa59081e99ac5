"""optimum: `ORTModelForCausalLM.from_pretrained(folder)`, which reads the shape of the cache from `config.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvsurgeon.targets.hugging_face_files import (
    check_left_padding,
    check_model_type,
    tokenizer_config_before_5,
    with_tokenizer_class,
    with_unknown_tokens,
)
from kvsurgeon.targets.model_info import ModelInfo
from kvsurgeon.targets.target import Incompatibility, Target

# Source: ORTModelForCausalLM.__init__ of optimum-onnx 0.1.0. It derives the shape of the empty caches from the config,
# by model type: types in the first set read `num_key_value_heads`, those in the second `head_dim`; any other type has
# as many KV heads as query heads, and head_dim is the hidden size divided by their number.
BY_KV_HEADS = frozenset((
    "arcee", "cohere", "gemma", "gemma3_text", "glm", "granite", "gpt_oss", "helium", "llama", "mistral", "nemotron",
    "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm",
))  # fmt: skip
BY_HEAD_DIM = {"gemma", "gemma3_text", "gpt_oss", "nemotron"}
BY_RULES_OF_THEIR_OWN = {"bloom", "deepseek_v3", "falcon", "gemma3", "gpt_bigcode"}
EXPLICIT = "gemma"  # the model type that reads every size from the config
EXPLICIT_VALUE_DIM = "deepseek_v3"  # the model type whose keys and values may differ in head_dim

_INPUTS = ("input_ids", "attention_mask", "position_ids")


def optimum_config(model: ModelInfo) -> Mapping[str, Any]:
    """Return a `config.json` from which optimum derives the shape of the cache in the graph.

    The config of the source is kept if it gives that shape. Otherwise `model_type` becomes one that reads every size
    from the config, and `original_model_type` keeps the old one.
    """
    config = {**model.config, "use_cache": True}
    if _gives_shape(config, model):
        return config
    original = config.get("model_type")
    key, value = _head_dims(model)
    config |= {
        "model_type": EXPLICIT,
        "num_key_value_heads": model.kv_heads[0],
        "head_dim": key,
        "num_hidden_layers": model.config.get("num_hidden_layers", model.layers),
        "num_attention_heads": model.query_heads or model.kv_heads[0],
    }
    if key != value:
        config |= {
            "model_type": EXPLICIT_VALUE_DIM, "qk_rope_head_dim": 0, "qk_nope_head_dim": key, "v_head_dim": value
        }  # fmt: skip
    if model.vocab_size is not None:
        config["vocab_size"] = model.vocab_size
    if original is not None:
        config.setdefault("original_model_type", original)
    return with_unknown_tokens(config)


def _gives_shape(config: Mapping[str, Any], model: ModelInfo) -> bool:
    """Return whether optimum derives the shape of the cache from this config."""
    kind = config.get("model_type")
    if kind is None or kind in BY_RULES_OF_THEIR_OWN:
        return False
    heads = config.get("num_attention_heads", config.get("n_head"))
    hidden = config.get("hidden_size", config.get("n_embd"))
    kv_heads = config.get("num_key_value_heads") if kind in BY_KV_HEADS else heads
    derived = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None
    head_dim = config.get("head_dim") if kind in BY_HEAD_DIM else derived
    return (kv_heads,) == model.kv_heads and (head_dim,) == model.head_dims


def _head_dims(model: ModelInfo) -> tuple[Any, Any]:
    """Return head_dim of keys and of values; if only one of them is cached, twice that of the one."""
    dims = {pair.kind: pair.past.dims[3] for pair in reversed(model.cache)}
    key = dims.get("key", dims.get("value"))
    return key, dims.get("value", key)


def _check(model: ModelInfo) -> Iterator[Incompatibility]:
    config = optimum_config(model) if model.kv_heads else {}
    yield from check_model_type(model, config, "optimum derives the shape of empty caches from the model type")
    yield from check_left_padding(model)
    heads = {pair.kind: pair.past.dims[1] for pair in model.cache}
    if len(set(heads.values())) > 1:
        counts = " and ".join(map(str, heads.values()))
        yield Incompatibility(f"expected as many heads of keys as of values, found {counts}")


def _tokenizer_config(model: ModelInfo) -> Mapping[str, Any] | None:
    """Return the tokenizer's config with its class, which otherwise follows from the model type; None to keep it."""
    replaced = optimum_config(model)["model_type"] != model.config.get("model_type")
    return with_tokenizer_class(model) if replaced else tokenizer_config_before_5(model)


OPTIMUM = Target(
    name="optimum",
    summary="ORTModelForCausalLM.from_pretrained(folder) of optimum",
    tested_with="optimum-onnx 0.1.0 with transformers 4.57",
    allowed_inputs=frozenset(_INPUTS),
    dtypes={name: {"int64", "int32"} for name in _INPUTS},
    cache_dtypes={"float32", "float16"},
    static_axes=(1, 3),
    uniform=True,
    side_files={"config.json": optimum_config, "tokenizer_config.json": _tokenizer_config},
    checks=(_check,),
)
