"""transformers.js: `AutoModelForCausalLM.from_pretrained(folder)` in a browser or in Node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvsurgeon.passes.interface.integer_inputs import Int64Inputs
from kvsurgeon.passes.interface.name_states import NameStates
from kvsurgeon.passes.interface.num_logits_to_keep import NumLogitsToKeep
from kvsurgeon.targets.hugging_face_files import (
    check_left_padding,
    check_model_type,
    in_strict_json,
    with_chat_template,
    with_unknown_tokens,
)
from kvsurgeon.targets.model_info import ModelInfo
from kvsurgeon.targets.target import Incompatibility, Target

# Source: getNormalizedConfig (src/configs.js) and the causal language models (src/models/registry.js) of version
# 4.3.2. It looks for one cache per layer of the config, and the name of that number depends on the model type: these
# types name it `num_hidden_layers`, count positions from 0, and cache only keys and values.
COUNTS_HIDDEN_LAYERS = frozenset((
    "afmoe", "apertus", "arcee", "cohere", "cohere2", "deepseek_v3", "ernie4_5", "gemma", "gemma2", "glm", "gpt_neox",
    "gpt_oss", "granite", "helium", "hunyuan_v1_dense", "llama", "ministral", "mistral", "nanochat", "olmo", "olmo2",
    "olmo3", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "solar_open", "stablelm",
    "starcoder2", "vaultgemma",
))  # fmt: skip
_FALLBACK = ("llama", "LlamaForCausalLM")  # model type and architecture in place of any other
_WITH_STATES = ("falcon_h1", "FalconH1ForCausalLM")  # for which it feeds keys, values and both states of any layer
_STATES = NameStates(conv="past_conv.{layer}", recurrent="past_ssm.{layer}")
_MAX_DATA_FILES = 100  # MAX_EXTERNAL_DATA_CHUNKS in src/utils/hub.js
_INPUTS = ("input_ids", "attention_mask", "position_ids", "num_logits_to_keep")


def own_config(config: Mapping[str, Any], data_files: int | Mapping[str, int]) -> dict[str, Any]:
    """Return the part of a config for transformers.js, with the number of data files, or that of each model."""
    own = {"dtype": "fp32", "use_external_data_format": data_files}  # fp32 names files without a suffix
    return {"transformers.js_config": {**config.get("transformers.js_config", {}), **own}}


def data_files_of_parts(model: ModelInfo) -> dict[str, int]:
    """Return the number of data files of a decoder and of the models next to it, by their names."""
    files = {name.removesuffix(".onnx"): part.data_files for name, part in model.parts.items()}
    return {"decoder_model_merged": model.data_files, **files}


def transformers_js_config(model: ModelInfo) -> Mapping[str, Any]:
    """Return a `config.json` by which transformers.js finds the caches and the data files."""
    config = in_strict_json(model.config)
    config |= own_config(config, model.data_files)
    counted = config.get("model_type") in COUNTS_HIDDEN_LAYERS and not model.states
    if counted and config.get("num_hidden_layers", 0) >= model.layers:
        return config
    if "model_type" in config:
        config.setdefault("original_model_type", config["model_type"])
    for name in ("layer_types", "layers_block_type") if model.states else ():
        config.pop(name, None)  # it looks for a cache of every kind in each layer then
    kind, architecture = _WITH_STATES if model.states else _FALLBACK
    kv_heads, head_dim = next(iter(model.kv_heads), 1), next(iter(model.head_dims), 1)
    config |= {
        "model_type": kind,
        "architectures": [architecture],
        "num_hidden_layers": max(pair.layer for pair in (*model.cache, *model.states)) + 1,
        "num_key_value_heads": kv_heads,
        "num_attention_heads": model.query_heads or kv_heads,
        "head_dim": head_dim,
        "multi_query": False,  # otherwise it looks for caches of keys and values in one tensor
        "is_encoder_decoder": False,
    }
    return with_unknown_tokens(config)


def _check(model: ModelInfo) -> Iterator[Incompatibility]:
    config = transformers_js_config(model) if model.cache or model.states else {}
    yield from check_model_type(model, config, "transformers.js counts caches by the model type")
    yield from check_left_padding(model)
    if model.data_files > _MAX_DATA_FILES:
        yield Incompatibility(f"expected at most {_MAX_DATA_FILES} files of external data, found {model.data_files}")
    if model.states and not model.cache:
        yield Incompatibility("expected attention, by whose cache transformers.js counts tokens, found states alone")
    for past in (pair.past for pair in (*model.cache, *model.states)):
        if past.dims[0] not in ("batch_size", 1):
            yield Incompatibility(f"expected batch axis 1 or batch_size, found {past.dims[0]}", at=past.name)
            return


TRANSFORMERS_JS = Target(
    name="transformers-js",
    summary="AutoModelForCausalLM.from_pretrained(folder) of @huggingface/transformers",
    tested_with="@huggingface/transformers 4.3.2 in Node with onnxruntime-node",
    after=(_STATES, Int64Inputs(), NumLogitsToKeep()),
    file="onnx/model.onnx",
    data="{file}_data",
    allowed_inputs=frozenset(_INPUTS),
    dtypes={name: {"int64"} for name in _INPUTS} | {"logits": {"float32", "float16"}},
    states={"conv_state", "recurrent_state"},
    cache_dtypes={"float32", "float16"},
    static_axes=(1, 3),
    required_files=("tokenizer.json", "tokenizer_config.json"),
    side_files={"config.json": transformers_js_config, "tokenizer_config.json": with_chat_template},
    checks=(_check,),
)
