"""What is written for a client says of the graph what the client must know."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made import facts

from kvsurgeon.targets.deepsparse import DEEPSPARSE
from kvsurgeon.targets.genai import GENAI, genai_config
from kvsurgeon.targets.obstacles import obstacles
from kvsurgeon.targets.optimum import BY_HEAD_DIM, BY_KV_HEADS, OPTIMUM
from kvsurgeon.targets.optimum import fitted_config as for_optimum
from kvsurgeon.targets.tokenizers import CONFIG, TOKENIZER, class_before_5, merges_as_text
from kvsurgeon.targets.transformers_js import TRANSFORMERS_JS
from kvsurgeon.targets.transformers_js import fitted_config as for_transformers_js


def stopping(target, about):
    return [str(one) for one in obstacles(target, about) if one.stops]


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
def test_optimum_reads_the_sizes_of_the_graph_whatever_the_config_was(config):
    assert as_optimum_reads(for_optimum(facts(config))) == (2, 8, 8)


def test_a_config_that_leads_optimum_there_is_kept_but_for_its_cache():
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "x": 1}
    assert for_optimum(facts(config)) == {**config, "use_cache": True}


def test_what_another_type_would_assume_of_tokens_is_said_to_be_unknown():
    fitted = for_optimum(facts({"model_type": "phi3", "eos_token_id": 7}))
    assert (fitted["original_model_type"], fitted["eos_token_id"], fitted["pad_token_id"]) == ("phi3", 7, None)


def test_keys_and_values_of_two_widths_are_expressed():
    assert as_optimum_reads(for_optimum(facts({"model_type": "llama"}, widths={"key": 8, "value": 6}))) == (2, 8, 6)


def test_what_no_config_of_optimum_expresses_stands_in_the_way():
    usual, other = facts(), facts(kv_heads=4)
    mixed = replace(usual, cache=(*usual.cache[:2], *other.cache[2:]))
    assert any("caches of one shape" in one for one in stopping(OPTIMUM, mixed))
    assert not stopping(OPTIMUM, usual)


def test_genai_is_told_names_and_sizes_of_the_graph():
    config = {"eos_token_id": [7, 9, 200], "bos_token_id": 1, "max_position_embeddings": 64, "num_attention_heads": 4}
    model = genai_config(facts(config))["model"]
    assert model["decoder"]["inputs"] == {
        "input_ids": "input_ids", "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
    }  # fmt: skip
    assert (model["vocab_size"], model["context_length"]) == (99, 64)
    assert (model["eos_token_id"], model["bos_token_id"], model["pad_token_id"]) == ([7, 9], 1, 7)
    sizes = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size")
    assert [model["decoder"][name] for name in sizes] == [2, 4, 2, 8]


def test_genai_is_told_what_nobody_says_and_its_user_too():
    written = genai_config(facts(inputs=("input_ids", "position_ids")))
    assert (written["model"]["eos_token_id"], written["search"]["max_length"]) == (0, 4096)
    assert written["model"]["decoder"]["inputs"]["position_ids"] == "position_ids"
    remarks = [str(one) for one in obstacles(GENAI, facts()) if not one.stops]
    assert [word in " ".join(remarks) for word in ("how long", "position_ids", "eos_token_id")] == [True] * 3
    told = facts(inputs=("input_ids", "attention_mask", "position_ids"))
    assert len([one for one in obstacles(GENAI, told) if not one.stops]) == len(remarks) - 1 == 2
    assert not stopping(GENAI, facts())


@pytest.mark.parametrize(
    ("about", "said"),
    [
        (facts(widths={"key": 8, "value": 6}), "keys and values of one shape"),
        (facts(widths={"key": 8}), "a key and a value of each layer"),
        (facts(dtype="uint8"), "found uint8"),
        (facts(inputs=("input_ids", "token_type_ids")), "found another - at `token_type_ids`"),
        (facts(inputs=("tokens",)), "expected an input or output `input_ids`"),
    ],
)
def test_what_genai_cannot_take_stands_in_the_way(about, said):
    assert any(said in one for one in stopping(GENAI, about))


@pytest.mark.parametrize("config", [{}, {"model_type": "bart", "num_hidden_layers": 1}, {"model_type": "gemma3_text"}])
def test_transformers_js_counts_the_caches_that_there_are(config):
    fitted = for_transformers_js(facts(config, data_files=2))
    assert (fitted["model_type"], fitted["num_hidden_layers"]) == ("llama", 2)
    assert fitted.get("original_model_type") == config.get("model_type")
    assert fitted["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": 2}


def test_a_config_that_transformers_js_reads_so_is_kept():
    config = {"model_type": "qwen2", "num_hidden_layers": 3, "transformers.js_config": {"device": "cpu"}}
    fitted = for_transformers_js(facts(config))
    assert {**fitted, "transformers.js_config": None} == {**config, "transformers.js_config": None}
    assert fitted["transformers.js_config"]["device"] == "cpu"


def test_transformers_js_takes_no_more_data_files_than_it_can_count():
    assert any("files of external data" in one for one in stopping(TRANSFORMERS_JS, facts(data_files=101)))
    assert not stopping(TRANSFORMERS_JS, facts(data_files=100))


def beside(name, said):
    return replace(facts(), beside={name: said})


def test_a_tokenizer_is_called_by_the_class_name_that_it_had_before():
    said = {"tokenizer_class": "TokenizersBackend", "eos_token": "</s>"}
    expected = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    assert class_before_5(beside(CONFIG, said)) == expected
    assert class_before_5(beside(CONFIG, {"tokenizer_class": "LlamaTokenizer"})) is None
    assert class_before_5(facts()) is None


def test_merges_are_texts_where_none_would_be_cut_at_another_place():
    said = {"version": "1.0", "model": {"type": "BPE", "merges": [["a", "b"], ["ab", "c"]]}}
    assert merges_as_text(beside(TOKENIZER, said))["model"] == {"type": "BPE", "merges": ["a b", "ab c"]}
    assert merges_as_text(beside(TOKENIZER, said))["version"] == "1.0"
    for merges in (["a b"], [["a", " b"]], []):
        assert merges_as_text(beside(TOKENIZER, {"model": {"merges": merges}})) is None
    assert merges_as_text(beside(TOKENIZER, {"model": None})) is None
    assert merges_as_text(facts()) is None


def test_deepsparse_is_given_a_config_where_there_is_none():
    (config,) = [side_file for side_file in DEEPSPARSE.side_files if side_file.name == "config.json"]
    assert config.write(facts()) == {"use_cache": True}
    assert config.write(facts({"model_type": "llama"})) is None
