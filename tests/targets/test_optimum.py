"""Out of the config that is written, optimum makes caches of the sizes that the graph has."""

import pytest

from kvsurgeon.targets.facts import CacheEntry, Facts, Tensor
from kvsurgeon.targets.obstacles import obstacles
from kvsurgeon.targets.optimum import BY_HEAD_DIM, BY_KV_HEADS, OPTIMUM, fitted_config


def facts(config, kv_heads=2, key=8, value=8, kinds=("key", "value")):
    sizes = {"key": key, "value": value}
    entries = [
        CacheEntry(layer=layer, kind=kind, past=tensor, present=tensor)
        for layer in range(2)
        for kind in kinds
        for tensor in [Tensor(name=f"past_key_values.{layer}.{kind}", dtype="float32",
                              dims=("batch_size", kv_heads, "past_sequence_length", sizes[kind]))]
    ]  # fmt: skip
    return Facts(
        inputs=(Tensor(name="input_ids", dtype="int64", dims=("batch_size", "sequence_length")),),
        outputs=(Tensor(name="logits", dtype="float32", dims=("batch_size", "sequence_length", 99)),),
        cache=tuple(entries), opset=18, operators={}, decoder=None, config=config,
    )  # fmt: skip


def as_optimum_reads(config):
    """Heads and widths of key and value, as `ORTModelForCausalLM.__init__` of 0.1.0 takes them from a config."""
    kind = config["model_type"]
    heads = config["num_key_value_heads" if kind in BY_KV_HEADS | {"deepseek_v3"} else "num_attention_heads"]
    if kind == "deepseek_v3":
        return heads, config["qk_rope_head_dim"] + config["qk_nope_head_dim"], config["v_head_dim"]
    width = config["head_dim"] if kind in BY_HEAD_DIM else config["hidden_size"] // config["num_attention_heads"]
    return heads, width, width


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32},
        {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 32},
        {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32},
        {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "head_dim": 8},
        {"model_type": "gemma", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "head_dim": 8},
        {"model_type": "falcon", "num_attention_heads": 2, "hidden_size": 16},
        {"model_type": "never heard of", "num_attention_heads": 2, "hidden_size": 16},
        {"model_type": "no numbers"},
    ],
)
def test_sizes_are_those_of_the_graph_whatever_the_config_was(config):
    fitted = fitted_config(facts(config))
    assert as_optimum_reads(fitted) == (2, 8, 8)


def test_a_config_that_leads_there_is_kept_but_for_its_cache():
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "x": 1}
    assert fitted_config(facts(config)) == {**config, "use_cache": True}


def test_what_another_type_would_assume_of_tokens_is_said_to_be_unknown():
    fitted = fitted_config(facts({"model_type": "phi3", "eos_token_id": 7}))
    assert (fitted["original_model_type"], fitted["eos_token_id"], fitted["pad_token_id"]) == ("phi3", 7, None)


def test_keys_and_values_of_two_widths_are_expressed():
    assert as_optimum_reads(fitted_config(facts({"model_type": "llama"}, value=6))) == (2, 8, 6)


def test_what_no_config_expresses_stands_in_the_way():
    odd = facts({})
    other = facts({}, kv_heads=4).cache[2:]
    mixed = Facts(**{**vars(odd), "cache": (*odd.cache[:2], *other)})
    assert any("caches of one shape" in str(one) for one in obstacles(OPTIMUM, mixed) if one.stops)
