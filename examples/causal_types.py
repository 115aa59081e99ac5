"""Export small decoders of the causal model types of transformers, with random weights and without a cache.

    pip install torch transformers onnxscript onnxruntime
    python examples/causal_types.py OUT TYPE [--exporter dynamo|torchscript]
    python benchmarks/causal_types.py OUT      # every type, each in a process, and what kvsurgeon makes of them

`OUT/EXPORTER/TYPE` holds `model.onnx`, `config.json`, `meta.json`, and `io.npz`: calls and the logits of torch.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import decoder_exports
import torch
import transformers
from decoder_exports import EXPORTERS, LAYERS, VOCABULARY
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Sizes of every configuration that has a setting of the name.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "text_vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "word_embed_proj_dim": 32, "dim": 32,
    "embedding_size": 32, "emb_dim": 32, "encoder_hidden_size": 32, "rnn_hidden_size": 32, "lru_width": 32,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 4, "multi_query_group_num": 2,
    "head_dim": 8, "kv_channels": 8, "global_head_dim": 8, "attention_head_dim": 8, "d_kv": 8,
    "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "d_ff": 64, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64,
    "ffn_hidden_size": 64, "feed_forward_size": 64, "intermediate_size_mlp": 64,
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS,
    "encoder_layers": LAYERS, "decoder_layers": LAYERS, "num_decoder_layers": LAYERS, "num_encoder_layers": LAYERS,
    "num_nextn_predict_layers": 0, "num_mem_blocks": 1, "num_kv_shared_layers": 0,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128, "context_length": 128,
    "sliding_window": 8, "window_size": 8, "attention_window_size": 8, "attention_chunk_size": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1, "num_shared_experts": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "moe_layer_start_index": 1, "decoder_sparse_step": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "o_lora_rank": 16, "o_groups": 2, "index_topk": 8, "index_n_heads": 16, "index_head_dim": 16,
    "hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "laurel_rank": 8,
    "state_size": 8, "mamba_d_state": 8, "ssm_state_size": 8, "mamba_headdim": 16, "mamba_head_dim": 16,
    "mamba_d_head": 16, "mamba_n_heads": 4, "mamba_num_heads": 4, "n_mamba_heads": 2, "mamba_expand": 2, "expand": 2,
    "n_groups": 1, "mamba_n_groups": 1, "mamba_ngroups": 1, "mamba_dt_rank": 4, "time_step_rank": 4, "conv_kernel": 4,
    "chunk_size": 8, "mamba_chunk_size": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "attention_hidden_size": 32, "block_size": 4,
    "adapter_rank": 4, "use_mem_rank": False, "rotary_dim": 4, "rotary_pct": 0.5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 2, "image_token_id": 150,
    "image_token_index": 150, "audio_token_id": 151, "video_token_id": 152, "boi_token_id": 153, "eoi_token_id": 154,
    "boa_token_id": 155, "eoa_token_id": 156, "decoder_start_token_id": 1, "num_codebooks": 1,
    "hidden_size_global": 32, "adapter_out_dim": 32, "adapter_in_dim": 32, "adapter_input_size": 32,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "use_cache": False, "is_decoder": True,
    "tie_word_embeddings": False, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0, "layerdrop": 0.0,
    "decoder_layerdrop": 0.0, "use_mamba_kernels": False, "add_cross_attention": False,
}  # fmt: skip
# Settings of one type, which the sizes above do not fit.
OF_TYPE: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "blt": {"patching_mode": "none", "encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {"layer_types": ["full_attention", "sliding_attention"],
                            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0}
                                                for kind in ("full_attention", "sliding_attention")}},
    "cpmant": {"dim_head": 8, "dim_ff": 64, "prompt_length": 4, "prompt_types": 4, "segment_types": 4},
    "ctrl": {"dff": 64},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
             "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "modernbert-decoder": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "mpt": {"expansion_ratio": 2},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "attention_head_size": 8,
                 "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 4,
                       "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "xlm": {"causal": True},
    "xlnet": {"mem_len": None, "attn_type": "uni"},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
BLOCKS = ("layer_types", "layers_block_type", "block_types", "attention_layers", "mlp_layer_types", "hybrid_override")


def small_config(model_type: str) -> transformers.PretrainedConfig:
    """Return the configuration of a type with small sizes, and of the text model inside it too."""
    usual = transformers.AutoConfig.for_model(model_type)
    return _small(usual, OF_TYPE.get(model_type, {}))


def _small(usual: transformers.PretrainedConfig, own: Mapping[str, Any]) -> transformers.PretrainedConfig:
    known = {**usual.to_dict(), **dict.fromkeys(getattr(usual, "attribute_map", {}))}
    settings = {name: value for name, value in SMALL.items() if name in known}
    if "kv_lora_rank" in known:  # every head has keys of its own
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    for name in BLOCKS:
        if isinstance(kinds := known.get(name), (list, tuple)) and kinds:
            settings[name] = _both_kinds(list(kinds))
    for name, value in vars(usual).items():
        if isinstance(value, transformers.PretrainedConfig):
            settings[name] = _small(value, OF_TYPE.get(value.model_type, {})).to_dict()
    return type(usual)(**{**settings, **own})


def _both_kinds(kinds: list[Any]) -> list[Any]:
    """Return the kinds of two layers: both that there are, if there are two."""
    found = list(dict.fromkeys(map(str, kinds)))
    first = {str(kind): kind for kind in kinds}
    return [first[name] for name in (found * LAYERS)[:LAYERS]]


def build(model_type: str, exporter: str) -> torch.nn.Module:
    """Return a model of a type with random weights that make its logits depend on every token and its position."""
    config = small_config(model_type)
    torch.manual_seed(0)
    try:
        model = _from_config(config, "sdpa" if exporter == "dynamo" else "eager")
    except ValueError:  # it has no such attention
        model = _from_config(config, "eager")
    return decoder_exports.randomize(model)


def _from_config(config: transformers.PretrainedConfig, attention: str) -> torch.nn.Module:
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if kind.config_class is not type(config):  # the model is the decoder alone
        config = next((value for value in vars(config).values() if type(value) is kind.config_class), config)
    return kind._from_config(config, attn_implementation=attention, experts_implementation="batched_mm")


def write(model_type: str, exporter: str, folder: Path) -> None:
    """Export a type, with its configuration."""

    def described() -> torch.nn.Module:
        model = build(model_type, exporter)
        model.config.to_json_file(folder / "config.json")
        return model

    facts = {"model_type": model_type, "transformers": transformers.__version__}
    decoder_exports.write(described, folder, exporter, **facts)


def main() -> None:
    """Export one type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("type", choices=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--exporter", choices=EXPORTERS, default="dynamo")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    write(args.type, args.exporter, args.out / args.exporter / args.type)


if __name__ == "__main__":
    main()
