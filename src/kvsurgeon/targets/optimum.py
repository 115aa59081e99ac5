"""optimum: `ORTModelForCausalLM.from_pretrained(folder)`, which takes the sizes of the caches from config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvsurgeon.targets.facts import Facts
from kvsurgeon.targets.target import Obstacle, SideFile, Target
from kvsurgeon.targets.tokenizers import CONFIG_BEFORE_5

# Source: ORTModelForCausalLM.__init__ of optimum-onnx 0.1.0. It makes the empty caches of the first call out of the
# config, by model type: these read `num_key_value_heads`, and these again `head_dim`; any other type has as many heads
# as queries have, and features that divide the hidden size.
BY_KV_HEADS = frozenset((
    "arcee", "cohere", "gemma", "gemma3_text", "glm", "granite", "gpt_oss", "helium", "llama", "mistral", "nemotron",
    "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm",
))  # fmt: skip
BY_HEAD_DIM = frozenset(("gemma", "gemma3_text", "gpt_oss", "nemotron"))
BY_RULES_OF_THEIR_OWN = frozenset(("bloom", "deepseek_v3", "falcon", "gemma3", "gpt_bigcode"))
SAYS_ALL = "gemma"  # the type whose sizes are just what the config says, nothing derived
SAYS_ALL_OF_TWO = "deepseek_v3"  # the one whose keys and values may differ in width

_FLOATS = frozenset(("float32", "float16"))
_IDS = frozenset(("int64", "int32"))
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def fitted_config(facts: Facts) -> Mapping[str, Any]:
    """Return a config.json out of which optimum makes caches of the sizes that the graph has.

    The source's config is kept wherever its numbers lead there. Where they do not, `model_type` becomes one by which
    optimum takes every size from the config as it stands, and `original_model_type` says what it was.
    """
    config = dict(facts.config)
    config["use_cache"] = True
    if _fits(config, facts):
        return config
    original = config.get("model_type")
    key, value = _widths(facts)
    config |= {
        "model_type": SAYS_ALL,
        "num_key_value_heads": facts.kv_heads[0],
        "head_dim": key,
        "num_hidden_layers": facts.config.get("num_hidden_layers", facts.layers),
        "num_attention_heads": facts.query_heads or facts.kv_heads[0],
    }
    if key != value:
        config |= {"model_type": SAYS_ALL_OF_TWO, "qk_rope_head_dim": 0, "qk_nope_head_dim": key, "v_head_dim": value}
    if facts.vocabulary is not None:
        config["vocab_size"] = facts.vocabulary
    if original is not None:
        config.setdefault("original_model_type", original)
    return {**dict.fromkeys(_TOKENS), **config}  # what the config left to its own type must not come from another


def _fits(config: Mapping[str, Any], facts: Facts) -> bool:
    """Return whether optimum computes from this config what the graph has."""
    kind = config.get("model_type")
    if kind is None or kind in BY_RULES_OF_THEIR_OWN:
        return False
    heads = config.get("num_attention_heads", config.get("n_head"))
    hidden = config.get("hidden_size", config.get("n_embd"))
    kv_heads = config.get("num_key_value_heads") if kind in BY_KV_HEADS else heads
    derived = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None
    head_dim = config.get("head_dim") if kind in BY_HEAD_DIM else derived
    return (kv_heads,) == facts.kv_heads and (head_dim,) == facts.head_dims


def _widths(facts: Facts) -> tuple[Any, Any]:
    """Return the features of a key's head and of a value's; those of the one where only one is remembered."""
    widths = {entry.kind: entry.past.dims[3] for entry in reversed(facts.cache)}
    key = widths.get("key", widths.get("value"))
    return key, widths.get("value", key)


def _worth_knowing(facts: Facts) -> Iterator[Obstacle]:
    config = fitted_config(facts) if facts.kv_heads else {}
    original = facts.config.get("model_type")
    if config.get("model_type") != original:
        was = "the source has no config" if original is None else f"the source's is {original}"
        yield Obstacle(
            what=f"optimum makes empty caches out of the config, by model type: config.json says model_type "
            f"{config.get('model_type')}, which takes the sizes as they stand there, and {was}",
            at="config.json",
            stops=False,
        )
    names = {tensor.name for tensor in facts.inputs}
    if "attention_mask" not in names:
        yield Obstacle(
            what="the model is given no attention_mask: prompts of a batch must be equally long", stops=False
        )
    elif "position_ids" not in names:
        yield Obstacle(
            what="the model is given no position_ids: padding on the left shifts the positions that it counts itself",
            stops=False,
        )


OPTIMUM = Target(
    name="optimum",
    summary="ORTModelForCausalLM.from_pretrained(folder) of optimum",
    tried="optimum-onnx 0.1.0 with transformers 4.57",
    feeds=frozenset(("input_ids", "attention_mask", "position_ids")),
    dtypes={name: _IDS for name in ("input_ids", "attention_mask", "position_ids")},
    cache_dtypes=_FLOATS,
    fixed_axes=(1, 3),
    uniform=True,
    side_files=(SideFile(name="config.json", write=fitted_config), CONFIG_BEFORE_5),
    rules=(_worth_knowing,),
)
