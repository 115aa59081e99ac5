"""Makes the small decoders of this folder with PyTorch's two exporters; the only test code that needs PyTorch.

    python tests/corpus/make_corpus.py [NAME...]

Two layers, hidden size 16, random weights large enough that logits depend on order, positions and masks. What an export
says of the machine it was made on is removed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
import transformers

FOLDER = Path(__file__).parent
LARGEST = 200_000  # bytes of a file
VOCABULARY, HIDDEN, LAYERS = 48, 16, 2

PLAIN = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
ROPE = {**PLAIN, "intermediate_size": 24, "max_position_embeddings": 64}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**ROPE, "num_key_value_heads": 2, "head_dim": 8}),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4,
                            "n_positions": 64}),
    "gemma2": ("Gemma2Config", {**ROPE, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4,
                                "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0,
                                "final_logit_softcapping": 9.0}),
    "neox": ("GPTNeoXConfig", {**ROPE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                           "partial_rotary_factor": 0.5}}),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4}),
    "codegen": ("CodeGenConfig", {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4,
                                  "n_positions": 64, "n_ctx": 64, "rotary_dim": 2}),
    "gptneo": ("GPTNeoConfig", {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_layers": LAYERS, "num_heads": 4,
                                "attention_types": [[["global", "local"], 1]], "window_size": 4,
                                "max_position_embeddings": 64}),
    "opt": ("OPTConfig", {**PLAIN, "ffn_dim": 24, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": 64}),
}  # fmt: skip

MODELS = [
    *(f"{family}_{exporter}_{attention}" for family in ("llama", "gpt2") for exporter in ("dynamo", "torchscript")
      for attention in ("eager", "sdpa")),
    "gemma2_dynamo_eager", "gemma2_torchscript_eager",
    "neox_dynamo_sdpa", "neox_torchscript_eager",
    "bloom_dynamo_eager", "bloom_torchscript_eager",
    *(f"sparseml/{family}_torchscript_eager" for family in ("codegen", "gptneo", "opt")),  # of its injector's tests
]  # fmt: skip


class WithoutCache(torch.nn.Module):
    """Logits of a text, from its tokens and their mask."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def build(family: str, attention: str) -> torch.nn.Module:
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * (1.0 if parameter.shape[0] >= VOCABULARY else 0.35))
    return WithoutCache(model)


def export(model: torch.nn.Module, exporter: str, target: Path) -> None:
    tokens = torch.arange(14).view(2, 7) * 5 % VOCABULARY
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["logits"]}
    if exporter == "dynamo":
        axes = {0: torch.export.Dim("batch_size"), 1: torch.export.Dim("sequence_length")}
        shapes = {"input_ids": axes, "attention_mask": axes}
        torch.onnx.export(model, (tokens, mask), target, dynamo=True, dynamic_shapes=shapes, opset_version=20,
                          external_data=False, verbose=False, **names)  # fmt: skip
        return
    free = {name: {0: "batch_size", 1: "sequence_length"} for name in ("input_ids", "attention_mask", "logits")}
    torch.onnx.export(model, (tokens, mask), target, dynamo=False, dynamic_axes=free, opset_version=17, **names)


def strip(path: Path) -> None:
    """Leave of the export's metadata only what names no file and no line of code."""
    model = onnx.load(path)
    model.doc_string = model.graph.doc_string = ""
    del model.metadata_props[:], model.graph.metadata_props[:]
    for function in model.functions:
        function.doc_string = ""
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.initializer, *model.graph.input):
        part.doc_string = ""
        scopes = [entry.value for entry in part.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        del part.metadata_props[:]
        if scopes:
            part.metadata_props.add(key="scopes", value=scopes[0])
    onnx.save(model, path)
    if path.stat().st_size > LARGEST:
        raise SystemExit(f"{path.name}: expected at most {LARGEST} bytes, found {path.stat().st_size}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=MODELS)
    warnings.simplefilter("ignore")
    for name in parser.parse_args().names:
        family, exporter, attention = Path(name).name.split("_")
        target = FOLDER / f"{name}.onnx"
        target.parent.mkdir(exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            export(build(family, attention), exporter, target)
        strip(target)
        print(f"{target.stat().st_size:7d} {name}")


if __name__ == "__main__":
    main()
