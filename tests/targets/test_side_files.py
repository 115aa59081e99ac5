"""The checks and side files of targets describe the graph to the client."""

from dataclasses import replace

import pytest
from model_infos import model_info

from kvsurgeon.targets.compatibility import find_incompatibilities
from kvsurgeon.targets.deepsparse import DEEPSPARSE
from kvsurgeon.targets.genai import GENAI, genai_config
from kvsurgeon.targets.hugging_face_files import tokenizer_config_before_5, tokenizer_with_text_merges
from kvsurgeon.targets.openvino import OPENVINO
from kvsurgeon.targets.optimum import BY_HEAD_DIM, BY_KV_HEADS, OPTIMUM, optimum_config
from kvsurgeon.targets.transformers_js import TRANSFORMERS_JS, transformers_js_config


def blocking(target, model):
    return [str(one) for one in find_incompatibilities(target, model) if one.blocking]


def warnings(target, model):
    return [str(one) for one in find_incompatibilities(target, model) if not one.blocking]


def read_as_optimum(config):
    """Return KV heads and the head_dim of keys and values, as `ORTModelForCausalLM.__init__` of 0.1.0 reads them."""
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
def test_optimum_reads_the_shape_of_the_graph_from_any_config(config):
    assert read_as_optimum(optimum_config(model_info(config))) == (2, 8, 8)


def test_a_config_that_gives_the_shape_is_kept_with_use_cache():
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "x": 1}
    assert optimum_config(model_info(config)) == {**config, "use_cache": True}


def test_special_tokens_that_the_config_lacks_are_null():
    fitted = optimum_config(model_info({"model_type": "phi3", "eos_token_id": 7}))
    assert (fitted["original_model_type"], fitted["eos_token_id"], fitted["pad_token_id"]) == ("phi3", 7, None)


def test_keys_and_values_may_differ_in_head_dim():
    assert read_as_optimum(optimum_config(model_info({"model_type": "llama"}, head_dims={"key": 8, "value": 6}))) == (
        2,
        8,
        6,
    )


def test_caches_of_different_shapes_block_optimum():
    usual, other = model_info(), model_info(kv_heads=4)
    mixed = replace(usual, cache=(*usual.cache[:2], *other.cache[2:]))
    assert any("caches of one shape" in one for one in blocking(OPTIMUM, mixed))
    mixed = replace(usual, cache=(*usual.cache[::2], *other.cache[1::2]))
    assert blocking(OPTIMUM, mixed) == ["expected as many heads of keys as of values, found 2 and 4"]
    assert not blocking(OPTIMUM, usual)


def test_genai_config_has_names_and_sizes_of_the_graph():
    config = {"eos_token_id": [7, 9, 200], "bos_token_id": 1, "max_position_embeddings": 64, "num_attention_heads": 4}
    model = genai_config(model_info(config))["model"]
    assert model["decoder"]["inputs"] == {
        "input_ids": "input_ids", "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
    }  # fmt: skip
    assert (model["vocab_size"], model["context_length"]) == (99, 64)
    assert (model["eos_token_id"], model["bos_token_id"], model["pad_token_id"]) == ([7, 9], 1, 7)
    sizes = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size")
    assert [model["decoder"][name] for name in sizes] == [2, 4, 2, 8]


def test_genai_config_has_defaults_and_warns_of_them():
    written = genai_config(model_info(inputs=("input_ids", "position_ids")))
    assert (written["model"]["eos_token_id"], written["search"]["max_length"]) == (0, 4096)
    assert written["model"]["decoder"]["inputs"]["position_ids"] == "position_ids"
    found = warnings(GENAI, model_info())
    assert [word in " ".join(found) for word in ("limit the length", "position_ids", "eos_token_id")] == [True] * 3
    with_positions = model_info(inputs=("input_ids", "attention_mask", "position_ids"))
    assert len(warnings(GENAI, with_positions)) == len(found) - 1 == 2
    assert not blocking(GENAI, model_info())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (model_info(head_dims={"key": 8, "value": 6}), "keys and values of one shape"),
        (model_info(head_dims={"key": 8}), "a key and a value of each layer"),
        (model_info(dtype="uint8"), "found uint8"),
        (model_info(inputs=("input_ids", "token_type_ids")), "found another - at `token_type_ids`"),
        (model_info(inputs=("tokens",)), "expected an input or output `input_ids`"),
    ],
)
def test_incompatibilities_with_genai(model, reason):
    assert any(reason in one for one in blocking(GENAI, model))


def test_openvino_takes_embeddings_and_masks_of_any_name():
    assert not blocking(OPENVINO, model_info(inputs=("inputs_embeds", "attention_mask", "sliding_mask")))


@pytest.mark.parametrize("config", [{}, {"model_type": "bart", "num_hidden_layers": 1}, {"model_type": "gemma3_text"}])
def test_transformers_js_finds_all_caches(config):
    fitted = transformers_js_config(model_info(config, data_files=2))
    assert (fitted["model_type"], fitted["num_hidden_layers"]) == ("llama", 2)
    assert fitted.get("original_model_type") == config.get("model_type")
    assert fitted["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": 2}


def test_a_config_that_transformers_js_can_use_is_kept():
    config = {"model_type": "qwen2", "num_hidden_layers": 3, "transformers.js_config": {"device": "cpu"}}
    fitted = transformers_js_config(model_info(config))
    assert {**fitted, "transformers.js_config": None} == {**config, "transformers.js_config": None}
    assert fitted["transformers.js_config"]["device"] == "cpu"


def test_transformers_js_loads_at_most_100_data_files():
    assert any("files of external data" in one for one in blocking(TRANSFORMERS_JS, model_info(data_files=101)))
    assert not blocking(TRANSFORMERS_JS, model_info(data_files=100))


def source_file(name, content):
    return replace(model_info(), source_files={name: content})


def test_the_tokenizer_class_has_its_name_before_transformers_5():
    content = {"tokenizer_class": "TokenizersBackend", "eos_token": "</s>"}
    expected = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    assert tokenizer_config_before_5(source_file("tokenizer_config.json", content)) == expected
    other = source_file("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    assert tokenizer_config_before_5(other) is None
    assert tokenizer_config_before_5(model_info()) is None


def test_a_replaced_model_type_does_not_choose_the_tokenizer():
    write = OPTIMUM.side_files["tokenizer_config.json"]
    kept = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    assert write(model_info(kept)) is None
    assert write(model_info({"model_type": "phi3"})) == {"tokenizer_class": "PreTrainedTokenizerFast"}
    named = replace(model_info(), source_files={"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}})
    assert write(named) is None


def test_a_chat_template_in_a_file_is_in_the_config_for_clients_that_read_it_there():
    template = "{{ messages }}"
    config = {"tokenizer_class": "TokenizersBackend"}
    given = replace(source_file("tokenizer_config.json", config), chat_template=template)
    write = TRANSFORMERS_JS.side_files["tokenizer_config.json"]
    assert write(given) == {**config, "chat_template": template}
    assert write(model_info()) is None
    assert write(replace(given, source_files={"tokenizer_config.json": {"chat_template": "own"}})) is None
    old = DEEPSPARSE.side_files["tokenizer_config.json"](given)
    assert old == {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}


def test_transformers_js_and_openvino_have_notes():
    assert any("left padding shifts" in one for one in warnings(TRANSFORMERS_JS, model_info()))
    assert any("INFERENCE_PRECISION_HINT" in one for one in warnings(OPENVINO, model_info()))


def test_merges_are_texts_unless_a_part_contains_a_space():
    content = {"version": "1.0", "model": {"type": "BPE", "merges": [["a", "b"], ["ab", "c"]]}}
    assert tokenizer_with_text_merges(source_file("tokenizer.json", content))["model"] == {
        "type": "BPE",
        "merges": ["a b", "ab c"],
    }
    assert tokenizer_with_text_merges(source_file("tokenizer.json", content))["version"] == "1.0"
    for merges in (["a b"], [["a", " b"]], []):
        assert tokenizer_with_text_merges(source_file("tokenizer.json", {"model": {"merges": merges}})) is None
    assert tokenizer_with_text_merges(source_file("tokenizer.json", {"model": None})) is None
    assert tokenizer_with_text_merges(model_info()) is None


def test_deepsparse_gets_a_config_if_the_source_has_none():
    write = DEEPSPARSE.side_files["config.json"]
    assert write(model_info()) == {"use_cache": True}
    assert write(model_info({"model_type": "llama"})) is None
