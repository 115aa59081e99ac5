"""Export a GPT-NeoX of the shape of Pythia-160M, with random weights, without a cache, by both exporters.

The model on which the paper on multi-layer key-value heads (MLKV) was tried: 12 layers of 12 heads. Its six
configurations are made, without torch, by `python benchmarks/mlkv.py OUT/dynamo OUT/torchscript`.

    pip install torch transformers onnxscript
    python examples/pythia.py OUT                   # OUT holds about 0.65 GB for each export
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from smollm2 import Export, signature, write_graph
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

SHAPE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SHARP = 0.06  # standard deviation of weights; with the usual 0.02 all tokens would be attended to nearly alike


def main() -> None:
    """Export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    folder = parser.parse_args().out
    torch.manual_seed(0)
    config = GPTNeoXConfig(**SHAPE, vocab_size=50304, initializer_range=SHARP, attn_implementation="sdpa")
    model = GPTNeoXForCausalLM(config).eval()
    for export in (Export(exporter="dynamo", attention="sdpa"), Export(exporter="torchscript", attention="sdpa")):
        target = folder / export.exporter
        target.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            write_graph(export, signature(model, with_past=False), target / "model.onnx")
        model.config.save_pretrained(target)


if __name__ == "__main__":
    main()
