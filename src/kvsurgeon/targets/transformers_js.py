"""transformers.js: `AutoModelForCausalLM.from_pretrained(folder)` in a browser or in Node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvsurgeon.passes.interface.integer_inputs import Int64Inputs
from kvsurgeon.targets.facts import Facts
from kvsurgeon.targets.target import Obstacle, SideFile, Target

# Source: getNormalizedConfig (src/configs.js) and the causal language models (src/models/registry.js) of version
# 4.3.1. It looks for as many caches as the config has layers, and each type calls its layers otherwise: these call
# them `num_hidden_layers`, count positions from 0, and have nothing but keys and values to remember.
COUNTS_HIDDEN_LAYERS = frozenset((
    "afmoe", "apertus", "arcee", "cohere", "cohere2", "deepseek_v3", "ernie4_5", "gemma", "gemma2", "glm", "gpt_neox",
    "gpt_oss", "granite", "helium", "hunyuan_v1_dense", "llama", "ministral", "mistral", "nanochat", "olmo", "olmo2",
    "olmo3", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "solar_open", "stablelm",
    "starcoder2", "vaultgemma",
))  # fmt: skip
PLAIN = ("llama", "LlamaForCausalLM")  # the type that stands in for one that transformers.js does not know so
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FEEDS = frozenset(("input_ids", "attention_mask", "position_ids"))


def fitted_config(facts: Facts) -> Mapping[str, Any]:
    """Return a config.json by which transformers.js finds the caches and the data files."""
    own = {"dtype": "fp32", "use_external_data_format": facts.data_files}  # fp32 names the file without a suffix
    config = {**facts.config, "transformers.js_config": {**facts.config.get("transformers.js_config", {}), **own}}
    if config.get("model_type") in COUNTS_HIDDEN_LAYERS and config.get("num_hidden_layers", 0) >= facts.layers:
        return config
    if "model_type" in config:
        config.setdefault("original_model_type", config["model_type"])
    kind, architecture = PLAIN
    config |= {
        "model_type": kind,
        "architectures": [architecture],
        "num_hidden_layers": facts.layers,
        "num_key_value_heads": facts.kv_heads[0],
        "num_attention_heads": facts.query_heads or facts.kv_heads[0],
        "head_dim": facts.head_dims[0],
        "multi_query": False,  # which would have it look for caches that hold a key and a value in one
        "is_encoder_decoder": False,
    }
    return {**dict.fromkeys(_TOKENS), **config}


def _worth_knowing(facts: Facts) -> Iterator[Obstacle]:
    original = facts.config.get("model_type")
    config = fitted_config(facts) if facts.cache else {}
    if config.get("model_type") != original:
        was = "the source has no config" if original is None else f"the source's is {original}"
        yield Obstacle(
            what="transformers.js counts caches by model type: config.json says model_type "
            f"{config.get('model_type')}, and {was}",
            at="config.json",
            stops=False,
        )
    if facts.data_files > _MOST_FILES:
        yield Obstacle(what=f"expected at most {_MOST_FILES} files of external data, found {facts.data_files}")
    for entry in facts.cache:
        if entry.past.dims[0] not in ("batch_size", 1):
            yield Obstacle(
                what=f"expected a batch called batch_size, or of 1, found {entry.past.dims[0]}", at=entry.past.name
            )
            return


_MOST_FILES = 100  # MAX_EXTERNAL_DATA_CHUNKS in src/utils/hub.js

TRANSFORMERS_JS = Target(
    name="transformers-js",
    summary="AutoModelForCausalLM.from_pretrained(folder) of @huggingface/transformers",
    tried="@huggingface/transformers 4.3.1 in Node with onnxruntime-node",
    after=(Int64Inputs(),),
    file="onnx/model.onnx",
    data="model.onnx_data",
    feeds=_FEEDS,
    dtypes={name: frozenset(("int64",)) for name in _FEEDS} | {"logits": frozenset(("float32", "float16"))},
    cache_dtypes=frozenset(("float32", "float16")),
    fixed_axes=(1, 3),
    beside=("tokenizer.json", "tokenizer_config.json"),
    side_files=(SideFile(name="config.json", write=fitted_config),),
    rules=(_worth_knowing,),
)
