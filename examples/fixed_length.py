"""Export seven families at a fixed length of 128, as `sparseml.transformers.export_onnx --sequence_length 128` does.

    pip install torch transformers==4.30.2 onnx onnxruntime
    python examples/fixed_length.py OUT FAMILY
    python benchmarks/fixed_length.py OUT      # every family, and what kvsurgeon makes of it

SparseML 1.6 calls the TorchScript exporter with these arguments: opset 14, a symbol for the batch alone, inputs in the
order of the tokenizer, and the model itself, told to keep no cache. `OUT/torchscript/FAMILY` holds what
`decoder_exports.py` says.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import decoder_exports
import torch
import transformers
from decoder_exports import LAYERS, LEAST, MOST, VOCABULARY

LENGTH = 128
TEXTS = ((1, LENGTH, 0), (2, LENGTH, 9))
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "is_decoder": True, "use_cache": False}
WIDTH, HEADS, POSITIONS = 32, 4, 512
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPT", {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 64, "num_hidden_layers": LAYERS,
                    "num_attention_heads": HEADS, "max_position_embeddings": POSITIONS}),
    "llama": ("Llama", {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS,
                        "num_attention_heads": HEADS, "max_position_embeddings": POSITIONS}),
    "codegen": ("CodeGen", {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS,
                            "n_ctx": POSITIONS, "rotary_dim": 4}),
    "bloom": ("Bloom", {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}),
    "gpt_neo": ("GPTNeo", {"hidden_size": WIDTH, "num_layers": LAYERS, "attention_types": [[["global", "local"], 1]],
                           "num_heads": HEADS, "window_size": 32, "max_position_embeddings": POSITIONS}),
    "gpt_neox": ("GPTNeoX", {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS,
                             "num_attention_heads": HEADS, "max_position_embeddings": POSITIONS}),
    "gpt2": ("GPT2", {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}),
}  # fmt: skip


def build(family: str) -> torch.nn.Module:
    """Return a small model of a family with random weights."""
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **settings)
    return decoder_exports.randomize(transformers.AutoModelForCausalLM.from_config(config))


def export(model: decoder_exports.Logits, file: Path, _exporter: str) -> None:
    """Write a model as SparseML does."""
    ids = torch.randint(LEAST, MOST, (1, LENGTH))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = [*inputs, "logits"]
    torch.onnx.export(
        model.model, (), str(file), kwargs=inputs, dynamo=False, opset_version=14, input_names=names[:-1],
        output_names=names[-1:], dynamic_axes={name: {0: "batch"} for name in names},
        training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=True, keep_initializers_as_inputs=False,
    )  # fmt: skip


def main() -> None:
    """Export one family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("family", choices=FAMILIES, nargs="?")
    parser.add_argument("--exporter", choices=["torchscript"], default="torchscript")
    parser.add_argument("--list", action="store_true", help="print the families")
    args = parser.parse_args()
    if args.list:
        print(*FAMILIES, sep="\n")
        return
    warnings.simplefilter("ignore")
    folder = args.out / args.exporter / args.family

    def described() -> torch.nn.Module:
        model = build(args.family)
        model.config.to_json_file(folder / "config.json")
        return model

    facts = {"model_type": args.family, "transformers": transformers.__version__}
    decoder_exports.write(described, folder, args.exporter, export=export, sizes=TEXTS, **facts)


if __name__ == "__main__":
    main()
