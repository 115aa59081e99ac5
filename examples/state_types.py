"""Export small decoders with convolutional or recurrent states, by symbols or, where that fails, at a fixed length.

    pip install torch transformers onnxscript onnxruntime
    python examples/state_types.py OUT TYPE [--exporter dynamo|torchscript]
    python benchmarks/state_types.py OUT      # every type, each in a process, and what kvsurgeon makes of them

`OUT/EXPORTER/TYPE` holds what `decoder_exports.py` says. Recurrences that Python computes token by token can only be
exported at a fixed length: one sequence of 16 tokens.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import decoder_exports
import onnx
import onnxruntime
import torch
import transformers
from causal_types import build
from decoder_exports import EXPORTERS, LEAST, MOST

LENGTH = 16
FIXED = ((1, LENGTH, 0), (1, LENGTH, 5))
TYPES = (
    "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "inkling2_text", "inkling_text",
    "jamba", "kimi_linear", "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid",
    "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "zaya",
)  # fmt: skip


def by_symbols(model: decoder_exports.Logits, file: Path, exporter: str) -> None:
    """Write a model with a batch and a length that are symbols, which onnxruntime loads."""
    decoder_exports.export_by_torch(model, file, exporter)
    count_perms_from_the_front(file)
    onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def at_fixed_length(model: decoder_exports.Logits, file: Path, exporter: str) -> None:
    """Write a model for one sequence of a fixed length."""
    ids = torch.randint(LEAST, MOST, (1, LENGTH))
    inputs = (ids, torch.ones_like(ids)) if model.masked else (ids,)
    names = ["input_ids", "attention_mask"][: len(inputs)]
    if exporter == "dynamo":
        torch.onnx.export(
            model, inputs, file, dynamo=True, opset_version=18, input_names=names, output_names=["logits"],
            external_data=False,
        )  # fmt: skip
    else:
        torch.onnx.export(
            model, inputs, str(file), dynamo=False, opset_version=17, input_names=names, output_names=["logits"]
        )
    count_perms_from_the_front(file)


def count_perms_from_the_front(file: Path) -> None:
    """Count the axes of each `Transpose` from the front: TorchScript writes negative ones, which ONNX does not have."""
    model = onnx.load(file)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Transpose" and attribute.name == "perm":
                attribute.ints[:] = [axis % len(attribute.ints) for axis in attribute.ints]
    onnx.save(model, file)


def main() -> None:
    """Export one type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("type", choices=TYPES, nargs="?")
    parser.add_argument("--exporter", choices=EXPORTERS, default="dynamo")
    parser.add_argument("--list", action="store_true", help="print the types")
    args = parser.parse_args()
    if args.list:
        print(*TYPES, sep="\n")
        return
    warnings.simplefilter("ignore")
    folder = args.out / args.exporter / args.type

    def described() -> torch.nn.Module:
        model = build(args.type, args.exporter)
        model.config.to_json_file(folder / "config.json")
        return model

    facts = {"model_type": args.type, "transformers": transformers.__version__}
    decoder_exports.write(described, folder, args.exporter, export=by_symbols, **facts)
    if '"stage": "exported"' not in (folder / "meta.json").read_text(encoding="utf-8"):
        decoder_exports.write(described, folder, args.exporter, export=at_fixed_length, sizes=FIXED, **facts)


if __name__ == "__main__":
    main()
