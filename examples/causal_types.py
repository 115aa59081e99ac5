"""Export small decoders of the causal model types of transformers, with random weights and without a cache.

    pip install torch transformers onnxscript onnxruntime
    python examples/causal_types.py OUT TYPE [--exporter dynamo|torchscript]
    python benchmarks/causal_types.py OUT      # every type, each in a process, and what kvsurgeon makes of them

`OUT/EXPORTER/TYPE` holds `model.onnx`, `config.json`, `meta.json`, and `io.npz`: calls and the logits of torch.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

EXPORTERS = ("dynamo", "torchscript")
LENGTH, BATCH = 11, 2  # of the text that is traced
VOCABULARY, LAYERS = 160, 2
SPREAD = 0.25  # standard deviation of weight matrices, so that tokens attend to few others

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
    "o_lora_rank": 16, "o_groups": 2, "index_topk": 8, "index_n_heads": 4, "index_head_dim": 16,
    "hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "laurel_rank": 8,
    "state_size": 8, "mamba_d_state": 8, "ssm_state_size": 8, "mamba_headdim": 16, "mamba_head_dim": 16,
    "mamba_d_head": 16, "mamba_n_heads": 4, "mamba_num_heads": 4, "n_mamba_heads": 2, "mamba_expand": 2, "expand": 2,
    "n_groups": 1, "mamba_n_groups": 1, "mamba_ngroups": 1, "mamba_dt_rank": 4, "time_step_rank": 4, "conv_kernel": 4,
    "chunk_size": 8, "mamba_chunk_size": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "attention_hidden_size": 32, "block_size": 4,
    "adapter_rank": 4, "use_mem_rank": False, "rotary_dim": 4, "rotary_pct": 0.5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 2, "image_token_id": 150,
    "image_token_index": 150, "audio_token_id": 151, "video_token_id": 152, "boi_token_id": 153, "eoi_token_id": 154,
    "boa_token_id": 155, "eoa_token_id": 156, "decoder_start_token_id": 1,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "use_cache": False, "is_decoder": True,
    "tie_word_embeddings": False, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0, "layerdrop": 0.0,
    "decoder_layerdrop": 0.0, "use_mamba_kernels": False, "add_cross_attention": False,
}  # fmt: skip
# Settings of one type, which the sizes above do not fit.
OF_TYPE: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "cohere_compass_text": {"layer_types": ["full_attention", "sliding_attention"]},
    "cpmant": {"dim_head": 8, "dim_ff": 64, "prompt_length": 4, "prompt_types": 2, "segment_types": 4},
    "ctrl": {"dff": 64},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
             "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "modernbert-decoder": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "mpt": {"expansion_ratio": 2},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "attention_head_size": 8,
                 "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "xlm": {"causal": True},
    "xlnet": {"mem_len": None, "attn_type": "uni"},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
EQUAL = 1e-3  # error below which an export computes what torch does
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
        if isinstance(value, transformers.PretrainedConfig) and name in ("text_config", "decoder", "decoder_config"):
            settings[name] = _small(value, own).to_dict()
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
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and weight.is_floating_point():
            torch.nn.init.normal_(weight, std=SPREAD if "embed" not in name else 0.5)
    return model.eval()


def _from_config(config: transformers.PretrainedConfig, attention: str) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="batched_mm"
    )


class Logits(torch.nn.Module):
    """A model as a function of token ids and a mask."""

    def __init__(self, model: torch.nn.Module, *, masked: bool) -> None:
        super().__init__()
        self.model, self.masked = model, masked

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits [batch, sequence, vocabulary]."""
        given = {"attention_mask": attention_mask} if self.masked else {}
        result = self.model(input_ids=input_ids, return_dict=True, **given, **_without_cache(self.model))
        return result.logits


def _without_cache(model: torch.nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def texts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids and masks: two texts, two of other lengths with left padding, and a longer one."""
    draw = np.random.default_rng(7)
    for batch, length, padding in ((2, 13, 0), (2, 12, 4), (1, 40, 0)):
        ids = draw.integers(4, 140, (batch, length))
        mask = np.ones_like(ids)
        mask[0, :padding] = 0
        yield ids, mask


def leak(model: Logits) -> float:
    """Return how much logits change, compared with their spread, if a later token changes."""
    ids, mask = map(torch.from_numpy, next(texts()))
    other = ids.clone()
    other[:, 9] = (other[:, 9] + 17) % 140
    with torch.no_grad():
        before, after = model(ids, mask), model(other, mask)
    return float((before[:, :9] - after[:, :9]).abs().max() / before.std())


def export(model: Logits, file: Path, exporter: str) -> None:
    """Write a model with a batch and a length that are symbols."""
    ids = torch.randint(4, 140, (BATCH, LENGTH))
    inputs = (ids, torch.ones_like(ids)) if model.masked else (ids,)
    names = ["input_ids", "attention_mask"][: len(inputs)]
    settings: dict[str, Any] = {"input_names": names, "output_names": ["logits"]}
    if exporter == "dynamo":
        axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", min=2, max=100)}
        settings |= {"dynamic_shapes": (axes,) * len(inputs), "external_data": False}
        torch.onnx.export(model, inputs, file, dynamo=True, opset_version=20, **settings)
    else:
        settings["dynamic_axes"] = {name: {0: "batch", 1: "sequence"} for name in (*names, "logits")}
        torch.onnx.export(model, inputs, str(file), dynamo=False, opset_version=17, **settings)


def write(model_type: str, exporter: str, folder: Path) -> None:
    """Export a type with what a verifier needs, and say in `meta.json` how far it came."""
    folder.mkdir(parents=True, exist_ok=True)
    meta: dict[str, Any] = {"model_type": model_type, "exporter": exporter, "transformers": transformers.__version__}
    began = time.perf_counter()
    try:
        meta["stage"] = "build"
        core = build(model_type, exporter)
        core.config.to_json_file(folder / "config.json")
        meta["stage"] = "run"
        model, meta["leak"] = _runnable(core)
        meta["masked"] = model.masked
        meta["stage"] = "export"
        export(model, folder / "model.onnx", exporter)
        meta["stage"] = "compare"
        calls = _calls(model)
        np.savez(folder / "io.npz", **calls)
        meta["export_error"] = _export_error(folder / "model.onnx", calls)
        meta["stage"] = "exported" if meta["export_error"] < EQUAL else "wrong export"
    except Exception as error:
        meta["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    meta["expected"] = "inject" if meta.get("leak", 1.0) < EQUAL else "refuse"
    meta["seconds"] = round(time.perf_counter() - began, 1)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _runnable(core: torch.nn.Module) -> tuple[Logits, float]:
    """Return the model with a mask, or without one if it takes none, and its leak."""
    try:
        model = Logits(core, masked=True).eval()
        return model, leak(model)
    except Exception:
        model = Logits(core, masked=False).eval()
        return model, leak(model)


def _calls(model: Logits) -> dict[str, np.ndarray]:
    calls = {}
    for index, (ids, mask) in enumerate(texts()):
        if not model.masked and not mask.all():
            continue
        with torch.no_grad():
            calls[f"logits_{index}"] = model(torch.from_numpy(ids), torch.from_numpy(mask)).float().numpy()
        calls[f"input_ids_{index}"] = ids
        if model.masked:
            calls[f"attention_mask_{index}"] = mask
    return calls


def _export_error(file: Path, calls: Mapping[str, np.ndarray]) -> float:
    """Return the largest difference of an export from torch at tokens that count, compared with the spread."""
    session, worst = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]), 0.0
    for name, expected in calls.items():
        index = name.removeprefix("logits_")
        if index == name:
            continue
        (found,) = session.run(None, {given.name: calls[f"{given.name}_{index}"] for given in session.get_inputs()})
        counts = calls.get(f"attention_mask_{index}", calls[f"input_ids_{index}"] * 0 + 1) == 1
        worst = max(worst, float(np.abs(found - expected)[counts].max() / expected.std()))
    return worst


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
