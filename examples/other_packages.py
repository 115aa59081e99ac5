"""Export small decoders of packages that are not transformers, with random weights and without a cache.

    pip install torch onnxscript onnxruntime
    python examples/other_packages.py --packages | xargs -n 1 pip install --no-deps    # and what they import
    python examples/other_packages.py OUT MODEL [--exporter dynamo|torchscript]
    python benchmarks/other_packages.py OUT    # every model, each in a process, and what kvsurgeon makes of them

`OUT/EXPORTER/MODEL` holds what `decoder_exports.py` says. A decoder is built as the package's own page shows it.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import decoder_exports
import torch
from decoder_exports import EXPORTERS, LAYERS, VOCABULARY

WIDTH, HEADS, HEAD, LENGTH = 32, 4, 8, 128
# Names that most packages share for the same sizes.
TOKENS: dict[str, Any] = {"num_tokens": VOCABULARY, "dim": WIDTH, "depth": LAYERS}
HEADED: dict[str, Any] = {**TOKENS, "heads": HEADS, "dim_head": HEAD}
LIMITED: dict[str, Any] = {**HEADED, "max_seq_len": LENGTH}


@dataclass(frozen=True)
class Decoder:
    """A decoder of a package: where its class is, and how it is built."""

    package: str  # on PyPI
    module: str
    build: Callable[[ModuleType], torch.nn.Module]


def of(name: str, **settings: Any) -> Callable[[ModuleType], torch.nn.Module]:
    """Return a builder of a class of a module with given settings."""
    return lambda module: getattr(module, name)(**settings)


def x_transformers(memory_tokens: int = 0, **settings: Any) -> Callable[[ModuleType], torch.nn.Module]:
    """Return a builder of a decoder of x-transformers, with memory tokens before the text."""

    def build(module: ModuleType) -> torch.nn.Module:
        layers = module.Decoder(dim=WIDTH, depth=LAYERS, heads=HEADS, attn_dim_head=HEAD, **settings)
        return module.TransformerWrapper(
            num_tokens=VOCABULARY, max_seq_len=LENGTH, attn_layers=layers, num_memory_tokens=memory_tokens
        )

    return build


def padded(name: str, **settings: Any) -> Callable[[ModuleType], torch.nn.Module]:
    """Return a builder of a class of a module whose texts its `Autopadder` fills up to whole buckets."""
    return lambda module: module.Autopadder(getattr(module, name)(**settings))


class Masked(torch.nn.Module):
    """A decoder that is given a mask by whoever calls it."""

    def __init__(self, model: torch.nn.Module, mask: Callable[[torch.Tensor], Any], *, name: str) -> None:
        super().__init__()
        self.model, self.mask, self.name = model, mask, name

    def forward(self, input_ids: torch.Tensor) -> Any:
        """Return what the model returns."""
        return self.model(input_ids, **{self.name: self.mask(input_ids)})


def causal(ids: torch.Tensor) -> torch.Tensor:
    """Return which token sees which: [sequence, sequence], True where it does."""
    return torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()


class LengthFirst(torch.nn.Module):
    """An embedding, a causal encoder of [sequence, batch, width], and a projection."""

    def __init__(self, embedding: torch.nn.Module, encoder: torch.nn.Module, projection: torch.nn.Module) -> None:
        super().__init__()
        self.embedding, self.encoder, self.projection = embedding, encoder, projection

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits [batch, sequence, vocabulary]."""
        hidden = self.encoder(self.embedding(input_ids.transpose(0, 1)), causal(input_ids)[:, :, None])
        return self.projection(hidden.transpose(0, 1))


def labml_gpt(attention: str) -> Callable[[ModuleType], torch.nn.Module]:
    """Return a builder of the GPT of labml with attention of one of its modules."""

    def build(module: ModuleType) -> torch.nn.Module:
        owner, _, name = attention.rpartition(".")
        forward = importlib.import_module("labml_nn.transformers.feed_forward").FeedForward(WIDTH, 2 * WIDTH)
        attend = getattr(importlib.import_module(f"labml_nn.transformers.{owner}"), name)(
            HEADS, WIDTH, dropout_prob=0.0
        )
        layer = module.TransformerLayer(d_model=WIDTH, self_attn=attend, feed_forward=forward, dropout_prob=0.0)
        embedding = module.EmbeddingsWithLearnedPositionalEncoding(WIDTH, VOCABULARY, LENGTH)
        return LengthFirst(embedding, module.Encoder(layer, LAYERS), torch.nn.Linear(WIDTH, VOCABULARY))

    return build


def curated(family: str, **settings: Any) -> Callable[[ModuleType], torch.nn.Module]:
    """Return a builder of a decoder of curated-transformers, which is given a mask of all tokens."""

    def build(module: ModuleType) -> torch.nn.Module:
        attention = importlib.import_module("curated_transformers.layers")
        config = getattr(module, f"{family}Config")(
            hidden_width=WIDTH, n_hidden_layers=LAYERS, n_pieces=VOCABULARY, dtype=torch.float32, **settings
        )
        model = getattr(module, f"{family}CausalLM")(config)
        return Masked(
            model,
            lambda ids: attention.AttentionMask(bool_mask=torch.ones_like(ids, dtype=torch.bool)),
            name="attention_mask",
        )

    return build


def litgpt(**settings: Any) -> Callable[[ModuleType], torch.nn.Module]:
    """Return a builder of a decoder of LitGPT."""
    sizes = {"block_size": LENGTH, "vocab_size": VOCABULARY, "padded_vocab_size": VOCABULARY, "n_layer": LAYERS,
             "n_head": HEADS, "n_embd": WIDTH}  # fmt: skip
    return lambda module: module.GPT(module.Config(**{**sizes, **settings}))


def transformer_lens(**settings: Any) -> Callable[[ModuleType], torch.nn.Module]:
    """Return a builder of a decoder of TransformerLens."""
    sizes = {"n_layers": LAYERS, "d_model": WIDTH, "n_ctx": LENGTH, "d_head": HEAD, "n_heads": HEADS,
             "d_vocab": VOCABULARY, "act_fn": "gelu", "device": "cpu"}  # fmt: skip
    return lambda module: module.HookedTransformer(module.HookedTransformerConfig(**{**sizes, **settings}))


def openelm(module: ModuleType) -> torch.nn.Module:
    """Return an OpenELM, whose layers have heads of other numbers."""
    config = module.ModelConfig(
        vocab_size=VOCABULARY, max_context_length=LENGTH, num_transformer_layers=LAYERS, model_dim=64, head_dim=HEAD,
        ffn_dim_divisor=8,
    )  # fmt: skip
    return Masked(module.OpenELM.from_config(config), causal, name="attn_mask")


def nano_gpt(module: ModuleType) -> torch.nn.Module:
    """Return a GPT of nano-gpt, which keeps its tokenizer."""
    config = importlib.import_module("nano_gpt.config").GPTConfig(
        block_size=LENGTH, vocab_size=VOCABULARY, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH
    )
    return module.GPT(config, None)


def pretrained_bert(module: ModuleType) -> torch.nn.Module:
    """Return a GPT-2 of pytorch-pretrained-bert."""
    config = module.GPT2Config(VOCABULARY, n_positions=LENGTH, n_ctx=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS)
    return module.GPT2LMHeadModel(config)


def pretrained_openai(module: ModuleType) -> torch.nn.Module:
    """Return an OpenAI GPT of pytorch-pretrained-bert."""
    config = module.OpenAIGPTConfig(
        VOCABULARY, n_special=0, n_positions=LENGTH, n_ctx=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS
    )
    return module.OpenAIGPTLMHeadModel(config)


def pretrained_xl(module: ModuleType) -> torch.nn.Module:
    """Return a Transformer-XL of pytorch-pretrained-bert, without memories."""
    config = module.TransfoXLConfig(
        VOCABULARY, cutoffs=[], d_model=WIDTH, d_embed=WIDTH, n_head=HEADS, d_head=HEAD, d_inner=64, div_val=1,
        n_layer=LAYERS, tgt_len=LENGTH, ext_len=0, mem_len=0, clamp_len=LENGTH,
    )  # fmt: skip
    return module.TransfoXLLMHeadModel(config)


def lmt(module: ModuleType) -> torch.nn.Module:
    """Return a GPT of language-modeling-transformers."""
    config = importlib.import_module("lmt.models.config").ModelConfig(
        context_length=LENGTH, vocab_size=VOCABULARY, num_layers=LAYERS, num_heads=HEADS, embed_dim=WIDTH, dropout=0.0
    )
    return module.GPT(config)


def olmo(**settings: Any) -> Callable[[ModuleType], torch.nn.Module]:
    """Return a builder of an OLMo of its authors' own package."""
    sizes = {"d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "mlp_ratio": 2, "max_sequence_length": LENGTH,
             "vocab_size": VOCABULARY, "embedding_size": VOCABULARY, "init_device": "cpu", "attention_dropout": 0.0,
             "residual_dropout": 0.0, "embedding_dropout": 0.0}  # fmt: skip
    return lambda module: module.OLMo(importlib.import_module("olmo.config").ModelConfig(**{**sizes, **settings}))


TUNE: dict[str, Any] = {"vocab_size": VOCABULARY, "num_layers": LAYERS, "num_heads": HEADS, "embed_dim": WIDTH,
                        "max_seq_len": LENGTH}  # fmt: skip

DECODERS: dict[str, Decoder] = {
    "x-transformers": Decoder("x-transformers", "x_transformers", x_transformers()),
    "x-transformers-rotary": Decoder(
        "x-transformers",
        "x_transformers",
        x_transformers(rotary_pos_emb=True, ff_glu=True, ff_swish=True, use_rmsnorm=True, attn_one_kv_head=True),
    ),
    "x-transformers-alibi": Decoder(
        "x-transformers", "x_transformers", x_transformers(alibi_pos_bias=True, attn_qk_norm=True)
    ),
    "x-transformers-memory": Decoder(
        "x-transformers", "x_transformers", x_transformers(memory_tokens=3, rotary_pos_emb=True)
    ),
    "x-transformers-t5": Decoder(
        "x-transformers", "x_transformers", x_transformers(rel_pos_bias=True, sandwich_norm=True)
    ),
    "local-attention": Decoder(
        "local-attention", "local_attention", of("LocalTransformer", **LIMITED, causal=True, local_attn_window_size=8)
    ),
    "palm": Decoder("PaLM-pytorch", "palm_pytorch", of("PaLM", **HEADED)),
    "palm-rlhf": Decoder("palm-rlhf-pytorch", "palm_rlhf_pytorch", of("PaLM", **HEADED)),
    "memory-efficient": Decoder(
        "memory-efficient-attention-pytorch",
        "memory_efficient_attention_pytorch.transformer",
        of("Transformer", **LIMITED, causal=True, use_flash_attn=False),
    ),
    "hierarchical": Decoder(
        "simple-hierarchical-transformer",
        "simple_hierarchical_transformer",
        of("HierarchicalTransformer", **HEADED, seq_len=LENGTH),
    ),
    "h-transformer": Decoder(
        "h-transformer-1d", "h_transformer_1d", of("HTransformer1D", **LIMITED, causal=True, block_size=8)
    ),
    "reformer": Decoder(
        "reformer-pytorch", "reformer_pytorch", padded("ReformerLM", **LIMITED, causal=True, bucket_size=4, n_hashes=2)
    ),
    "sinkhorn": Decoder(
        "sinkhorn-transformer",
        "sinkhorn_transformer",
        padded("SinkhornTransformerLM", **LIMITED, causal=True, bucket_size=8),
    ),
    "routing": Decoder(
        "routing-transformer", "routing_transformer", of("RoutingTransformerLM", **LIMITED, causal=True, window_size=8)
    ),
    "linear-attention": Decoder(
        "linear-attention-transformer",
        "linear_attention_transformer",
        of("LinearAttentionTransformerLM", **LIMITED, causal=True),
    ),
    "performer": Decoder("performer-pytorch", "performer_pytorch", of("PerformerLM", **LIMITED, causal=True)),
    "block-recurrent": Decoder(
        "block-recurrent-transformer-pytorch",
        "block_recurrent_transformer_pytorch",
        of("BlockRecurrentTransformer", **LIMITED, block_width=16),
    ),
    "recurrent-memory": Decoder(
        "recurrent-memory-transformer-pytorch",
        "recurrent_memory_transformer_pytorch",
        of("RecurrentMemoryTransformer", **HEADED, num_memory_tokens=4, seq_len=LENGTH),
    ),
    "megabyte": Decoder(
        "MEGABYTE-pytorch",
        "MEGABYTE_pytorch",
        of("MEGABYTE", num_tokens=VOCABULARY, dim=WIDTH, depth=(2, 2), max_seq_len=(32, 4), heads=HEADS, dim_head=HEAD),
    ),
    "infini": Decoder("infini-transformer-pytorch", "infini_transformer_pytorch", of("InfiniTransformer", **HEADED)),
    "coconut": Decoder("coconut-pytorch", "coconut_pytorch.coconut", of("Transformer", **HEADED)),
    "gateloop": Decoder(
        "gateloop-transformer",
        "gateloop_transformer",
        of("Transformer", **TOKENS, use_gate_looped_attn=False, dim_head=HEAD, heads=HEADS, rotary_emb=True),
    ),
    "feedback": Decoder(
        "feedback-transformer-pytorch", "feedback_transformer_pytorch", of("FeedbackTransformer", **HEADED, mem_len=16)
    ),
    "speculative": Decoder(
        "speculative-decoding", "speculative_decoding.speculative_decoding", of("Decoder", **HEADED)
    ),
    "rela": Decoder(
        "rela-transformer", "rela_transformer.rela_transformer", of("ReLATransformer", **LIMITED, causal=True)
    ),
    "ring": Decoder(
        "ring-attention-pytorch",
        "ring_attention_pytorch",
        of("RingTransformer", **HEADED, causal=True, bucket_size=8, ring_attn=False, force_regular_attn=True),
    ),
    "flash": Decoder(
        "FLASH-pytorch", "flash_pytorch", of("FLASHTransformer", **TOKENS, group_size=8, query_key_dim=16, causal=True)
    ),
    "gmlp": Decoder("g-mlp-pytorch", "g_mlp_pytorch", of("gMLP", **TOKENS, seq_len=LENGTH, causal=True)),
    "mega": Decoder("mega-pytorch", "mega_pytorch", of("Mega", **TOKENS, causal=True)),
    "memory-xl": Decoder(
        "memory-transformer-xl",
        "memory_transformer_xl",
        of("MemoryTransformerXL", num_tokens=VOCABULARY, dim=WIDTH, depth=LAYERS, seq_len=64, heads=HEADS),
    ),
    "complex": Decoder(
        "complex-valued-transformer",
        "complex_valued_transformer.complex_valued_transformer",
        of("ComplexTransformer", **HEADED, causal=True, complete_complex=False, flash_attn=False),
    ),
    "labml-gpt": Decoder("labml-nn", "labml_nn.transformers.models", labml_gpt("mha.MultiHeadAttention")),
    "labml-rope": Decoder("labml-nn", "labml_nn.transformers.models", labml_gpt("rope.RotaryPEMultiHeadAttention")),
    "labml-alibi": Decoder("labml-nn", "labml_nn.transformers.models", labml_gpt("alibi.AlibiMultiHeadAttention")),
    "labml-primer": Decoder("labml-nn", "labml_nn.transformers.models", labml_gpt("primer_ez.MultiDConvHeadAttention")),
    "labml-relative": Decoder(
        "labml-nn", "labml_nn.transformers.models", labml_gpt("xl.relative_mha.RelativeMultiHeadAttention")
    ),
    "torchtune-llama3": Decoder("torchtune", "torchtune.models.llama3", of("llama3", **TUNE, num_kv_heads=2)),
    "torchtune-gemma": Decoder(
        "torchtune", "torchtune.models.gemma", of("gemma", **TUNE, head_dim=HEAD, num_kv_heads=1, intermediate_dim=64)
    ),
    "torchtune-qwen2": Decoder(
        "torchtune", "torchtune.models.qwen2", of("qwen2", **TUNE, num_kv_heads=2, intermediate_dim=64)
    ),
    "litgpt-pythia": Decoder("litgpt", "litgpt", litgpt()),
    "litgpt-llama": Decoder(
        "litgpt",
        "litgpt",
        litgpt(
            n_query_groups=2,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=64,
        ),
    ),
    "litgpt-mixtral": Decoder(
        "litgpt",
        "litgpt",
        litgpt(
            n_query_groups=2,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMoE",
            moe_intermediate_size=32,
            intermediate_size=32,
            n_expert=4,
            n_expert_per_token=2,
        ),
    ),
    "curated-llama": Decoder(
        "curated-transformers",
        "curated_transformers.models",
        curated("Llama", intermediate_width=64, n_query_heads=HEADS, n_key_value_heads=2),
    ),
    "curated-neox": Decoder(
        "curated-transformers",
        "curated_transformers.models",
        curated("GPTNeoX", intermediate_width=64, n_attention_heads=HEADS),
    ),
    "curated-falcon": Decoder(
        "curated-transformers",
        "curated_transformers.models",
        curated("Falcon", n_query_heads=HEADS, n_key_value_heads=1),
    ),
    "curated-mpt": Decoder(
        "curated-transformers",
        "curated_transformers.models",
        curated("MPT", intermediate_width_multiplier=2, n_attention_heads=HEADS),
    ),
    "lens-gpt2": Decoder("transformer-lens", "transformer_lens", transformer_lens(normalization_type="LN")),
    "lens-rotary": Decoder(
        "transformer-lens",
        "transformer_lens",
        transformer_lens(
            normalization_type="RMS",
            positional_embedding_type="rotary",
            rotary_dim=HEAD,
            final_rms=True,
            gated_mlp=True,
            n_key_value_heads=2,
        ),
    ),
    "olmo": Decoder("ai2-olmo", "olmo.model", olmo(rope=True)),
    "olmo-alibi": Decoder("ai2-olmo", "olmo.model", olmo(alibi=True, flash_attention=False)),
    "pretrained-gpt2": Decoder("pytorch-pretrained-bert", "pytorch_pretrained_bert", pretrained_bert),
    "pretrained-openai": Decoder("pytorch-pretrained-bert", "pytorch_pretrained_bert", pretrained_openai),
    "nano-gpt": Decoder("nano-gpt", "nano_gpt.model", nano_gpt),
    "picogpt": Decoder(
        "picogpt",
        "picogpt.model",
        of(
            "TinyGPT",
            V=VOCABULARY,
            n_embd=WIDTH,
            n_head=HEADS,
            n_layer=LAYERS,
            block_size=LENGTH,
            dropout=0.0,
            rope_base=1e4,
        ),
    ),
    "lmt": Decoder("language-modeling-transformers", "lmt.models.gpt.gpt", lmt),
    "openelm": Decoder("openelm-pytorch", "openelm_pytorch.openelm", openelm),
}


def build(name: str) -> torch.nn.Module:
    """Return a decoder with random weights."""
    decoder = DECODERS[name]
    torch.manual_seed(0)
    return decoder_exports.randomize(decoder.build(importlib.import_module(decoder.module)))


def main() -> None:
    """Export one decoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("model", choices=DECODERS, nargs="?")
    parser.add_argument("--exporter", choices=EXPORTERS, default="dynamo")
    parser.add_argument("--packages", action="store_true", help="print the packages")
    parser.add_argument("--list", action="store_true", help="print the decoders")
    args = parser.parse_args()
    if args.packages or args.list:
        print(*(sorted({one.package for one in DECODERS.values()}) if args.packages else DECODERS), sep="\n")
        return
    warnings.simplefilter("ignore")
    package = DECODERS[args.model].package
    folder = args.out / args.exporter / args.model
    decoder_exports.write(lambda: build(args.model), folder, args.exporter, family=package)


if __name__ == "__main__":
    main()
