"""Export decoders with the configurations of well-known models, random weights and few layers, without a cache.

Heads, head_dim, rotary settings, windows and context lengths are those of the models, written out below; vocabulary,
feed-forward layers, the number of layers and, where head_dim is a setting of its own, the hidden size are small.
Decoders with a causal mask as a registered buffer, as nanoGPT has one, follow. Each folder holds `model.onnx`,
`model.onnx.data`, `config.json` and `facts.json`: what `kvsurgeon inspect` should say of it.

    pip install torch transformers onnxscript
    python examples/real_configs.py OUT [--only NAME] [--exporter dynamo|torchscript]      # OUT holds about 4 GB
    python benchmarks/real_configs.py OUT
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from smollm2 import Export, Signature, signature, write_graph

SMALL = {"vocab_size": 512, "initializer_range": 0.05}
SHARP = 0.05  # standard deviation of weights, so that tokens attend to few others


@dataclass(frozen=True, kw_only=True)
class Model:
    """A configuration, and the facts about its layers."""

    name: str
    config: str  # class in transformers
    model: str  # class in transformers
    settings: dict[str, Any]
    layers: list[dict[str, Any]]  # kv_heads, head_dim, rotary_dim, window
    max_length: int | None = None  # where tables end, or factors change; None if nowhere
    attention: str = "sdpa"  # implementation in transformers


def layer(kv_heads: int, head_dim: int, *, rotary: int | None, window: int | None = None) -> dict[str, Any]:
    """Return the facts about a layer; `rotary` is the number of features that are rotated."""
    return {"kv_heads": kv_heads, "head_dim": head_dim, "rotary_dim": rotary, "window": window}


LLAMA_3_1_8B = Model(
    name="llama-3.1-8b",
    config="LlamaConfig",
    model="LlamaForCausalLM",
    settings={
        "hidden_size": 1024,  # 4096
        "intermediate_size": 512,  # 14336
        "num_hidden_layers": 2,  # 32
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    layers=[layer(8, 128, rotary=128)] * 2,
)
MISTRAL_7B = Model(
    name="mistral-7b",
    config="MistralConfig",
    model="MistralForCausalLM",
    settings={
        "hidden_size": 1024,  # 4096
        "intermediate_size": 512,  # 14336
        "num_hidden_layers": 2,  # 32
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    layers=[layer(8, 128, rotary=128, window=4096)] * 2,
)
GEMMA_3_1B = Model(
    name="gemma-3-1b",
    config="Gemma3TextConfig",
    model="Gemma3ForCausalLM",
    settings={
        "hidden_size": 1152,
        "intermediate_size": 512,  # 6912
        "num_hidden_layers": 6,  # 26
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    layers=[layer(1, 256, rotary=256, window=512)] * 5 + [layer(1, 256, rotary=256)],
)
GEMMA_3_4B = Model(
    name="gemma-3-4b",
    config="Gemma3TextConfig",
    model="Gemma3ForCausalLM",
    settings={
        "hidden_size": 1280,  # 2560
        "intermediate_size": 512,  # 10240
        "num_hidden_layers": 6,  # 34
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 1024,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    layers=[layer(4, 256, rotary=256, window=1024)] * 5 + [layer(4, 256, rotary=256)],
)
PHI_3_5_MINI = Model(
    name="phi-3.5-mini-128k",
    config="Phi3Config",
    model="Phi3ForCausalLM",
    settings={
        "hidden_size": 3072,
        "intermediate_size": 512,  # 8192
        "num_hidden_layers": 2,  # 32
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "sliding_window": 262144,
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 4096,
            # one factor for each pair of features: ramps between the ends of the trained ones
            "short_factor": [1.0 + 1.8 * index / 47 for index in range(48)],
            "long_factor": [1.08 * 60.0 ** (index / 47) for index in range(48)],
        },
    },
    layers=[layer(32, 96, rotary=96)] * 2,
    max_length=4096,  # longer texts have other factors from their first token on
)
GPT_OSS_20B = Model(
    name="gpt-oss-20b",
    config="GptOssConfig",
    model="GptOssForCausalLM",
    settings={
        "hidden_size": 720,  # 2880
        "intermediate_size": 256,  # 2880
        "num_hidden_layers": 2,  # 24
        "num_local_experts": 4,  # 32
        "num_experts_per_tok": 2,  # 4
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"],
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    layers=[layer(8, 64, rotary=64, window=128), layer(8, 64, rotary=64)],
    attention="eager",
)
QWEN_3_8B = Model(
    name="qwen-3-8b",
    config="Qwen3Config",
    model="Qwen3ForCausalLM",
    settings={
        "hidden_size": 1024,  # 4096
        "intermediate_size": 512,  # 12288
        "num_hidden_layers": 2,  # 36
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    layers=[layer(8, 128, rotary=128)] * 2,
)
QWEN_2_5_1M = Model(
    name="qwen-2.5-7b-1m",
    config="Qwen2Config",
    model="Qwen2ForCausalLM",
    settings={
        "hidden_size": 3584,
        "intermediate_size": 512,  # 18944
        "num_hidden_layers": 2,  # 28
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1010000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0},
    },
    layers=[layer(4, 128, rotary=128)] * 2,
)
MPT_7B = Model(
    name="mpt-7b",
    config="MptConfig",
    model="MptForCausalLM",
    settings={
        "d_model": 4096,
        "n_heads": 32,
        "n_layers": 2,  # 32
        "expansion_ratio": 1,  # 4
        "max_seq_len": 2048,
        "no_bias": True,
        "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_type": "multihead_attention"},
    },
    layers=[layer(32, 128, rotary=None)] * 2,
    max_length=2048,
    attention="eager",
)
FALCON_7B = Model(
    name="falcon-7b",
    config="FalconConfig",
    model="FalconForCausalLM",
    settings={
        "hidden_size": 4544,
        "ffn_hidden_size": 1024,  # 18176
        "num_hidden_layers": 2,  # 32
        "num_attention_heads": 71,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "alibi": False,
        "bias": False,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    layers=[layer(1, 64, rotary=64)] * 2,
)
GRANITE_3_1_8B = Model(
    name="granite-3.1-8b",
    config="GraniteConfig",
    model="GraniteForCausalLM",
    settings={
        "hidden_size": 4096,
        "intermediate_size": 512,  # 12800
        "num_hidden_layers": 2,  # 40
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0},
        "embedding_multiplier": 12.0,
        "logits_scaling": 16.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0078125,
    },
    layers=[layer(8, 128, rotary=128)] * 2,
)
MODELS = (
    *(LLAMA_3_1_8B, MISTRAL_7B, GEMMA_3_1B, GEMMA_3_4B, PHI_3_5_MINI, GPT_OSS_20B, QWEN_3_8B, QWEN_2_5_1M, MPT_7B),
    *(FALCON_7B, GRANITE_3_1_8B),
)
BUFFERED = (1024, 5000, 8192)  # context lengths of decoders with a mask as a buffer


class BufferedAttention(torch.nn.Module):
    """Attention with the causal mask of the whole context as a registered buffer, `[1, 1, context, context]`."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.c_attn, self.c_proj = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.register_buffer("bias", torch.tril(torch.ones(context, context)).view(1, 1, context, context))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the attended values, `[batch, sequence, width]`."""
        batch, length, width = x.size()
        parts = self.c_attn(x).split(self.width, dim=2)
        query, key, value = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for part in parts
        )
        scores = (query @ key.transpose(-2, -1)) * (width // self.heads) ** -0.5
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        mixed = torch.softmax(scores, dim=-1) @ value
        return self.c_proj(mixed.transpose(1, 2).contiguous().view(batch, length, width))


class BufferedDecoder(torch.nn.Module):
    """A GPT-2 with learned positions and a mask buffer in each layer."""

    def __init__(
        self, context: int, *, width: int = 128, heads: int = 4, layers: int = 2, vocabulary: int = 512
    ) -> None:
        super().__init__()
        self.wte, self.wpe = torch.nn.Embedding(vocabulary, width), torch.nn.Embedding(context, width)
        self.attentions = torch.nn.ModuleList(BufferedAttention(width, heads, context) for _ in range(layers))
        self.feeds = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, width))
            for _ in range(layers)
        )
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.head = torch.nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        positions = torch.arange(0, input_ids.size(1), dtype=torch.long, device=input_ids.device).unsqueeze(0)
        x = self.wte(input_ids) + self.wpe(positions)
        for index, (attention, feed) in enumerate(zip(self.attentions, self.feeds, strict=True)):
            x = x + attention(self.norms[2 * index](x))
            x = x + feed(self.norms[2 * index + 1](x))
        return self.head(self.norms[-1](x))


def prepare(model: Model) -> tuple[Signature, dict[str, Any], Callable[[Path], object]]:
    """Return the inputs and outputs of a configuration, its facts, and what writes its config."""
    config = getattr(transformers, model.config)(**SMALL, **model.settings)
    config._attn_implementation = model.attention
    if hasattr(config, "num_local_experts"):
        config._experts_implementation = "batched_mm"  # the default is one that neither exporter takes
    made = getattr(transformers, model.model)(config).eval()
    facts = {"layers": model.layers, "max_length": model.max_length}
    return signature(made, with_past=False), facts, config.save_pretrained


def prepare_buffered(context: int) -> tuple[Signature, dict[str, Any], Callable[[Path], object]]:
    """Return the inputs and outputs of a decoder with a mask buffer, and its facts."""
    made = BufferedDecoder(context).eval()
    for name, weight in made.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=3 * SHARP)
    tokens = torch.randint(10, 500, (2, 5))
    axes = {0: "batch_size", 1: "sequence_length"}
    taken = Signature(module=made, arguments=(tokens,), inputs={"input_ids": axes}, outputs={"logits": axes})
    facts = {"layers": [layer(4, 32, rotary=None)] * 2, "max_length": context}
    return taken, facts, lambda folder: None


def register_copy() -> None:
    """Teach the TorchScript exporter `aten::copy`, by which transformers chooses the frequencies of LongRoPE."""

    def copied(g: Any, target: Any, source: Any, _non_blocking: Any) -> Any:
        return g.op("Expand", source, g.op("Shape", target))

    torch.onnx.register_custom_op_symbolic("aten::copy", copied, 9)


def export_all(out: Path, exporters: list[str], only: str | None) -> list[str]:
    """Write all exports; return what failed."""
    prepared: dict[str, Callable[[], tuple[Signature, dict[str, Any], Callable[[Path], object]]]] = {
        model.name: (lambda model=model: prepare(model)) for model in MODELS
    }
    prepared |= {f"mask-buffer-{size}": (lambda size=size: prepare_buffered(size)) for size in BUFFERED}
    failed = []
    for name, make in prepared.items():
        if only and only not in name:
            continue
        for exporter in exporters:
            torch.manual_seed(0)
            folder = out / f"{name}-{exporter}"
            folder.mkdir(parents=True, exist_ok=True)
            try:
                taken, facts, save_config = make()
                with torch.no_grad():
                    write_graph(Export(exporter=exporter, attention="sdpa"), taken, folder / "model.onnx")
            except Exception:
                failed.append(f"{name} {exporter}: {traceback.format_exc(limit=-1).splitlines()[-1][:300]}")
                (folder / "failed.txt").write_text(traceback.format_exc(), encoding="utf-8")
                continue
            save_config(folder)
            (folder / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
            print(f"written: {folder}", flush=True)
    return failed


def main() -> None:
    """Export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--only", metavar="NAME", help="only models whose name contains this")
    parser.add_argument("--exporter", choices=["dynamo", "torchscript"], action="append")
    options = parser.parse_args()
    register_copy()
    failed = export_all(options.out, options.exporter or ["dynamo", "torchscript"], options.only)
    for line in failed:
        print(f"not exported: {line}")


if __name__ == "__main__":
    main()
