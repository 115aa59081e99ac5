"""Export small encoder-decoder models with random weights, as the clients of these targets need them.

Each model is exported by both exporters *without* a cache: `encoder_model.onnx`, and `decoder_model.onnx`, which takes
the encoder's output. Greedy decoding with the exported files must give the tokens of `generate` of transformers.

    pip install torch transformers onnxscript onnxruntime
    python examples/encoder_decoders.py OUT
    python tests/clients/run.py optimum-seq2seq --models OUT/*
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationMixin,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

NEW_TOKENS = 32
_TOKENS = {"vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
           "tie_word_embeddings": False}  # tied ones repeat a token  # fmt: skip
_SIZES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
          "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.3}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Model:
    """A small model with random weights.

    Attributes:
        name: Name of its folder.
        model: The model.
        given: Example inputs of its encoder.
        free: The axes of these inputs that have any size, besides the batch.
    """

    name: str
    model: PreTrainedModel
    given: Mapping[str, torch.Tensor]
    free: Mapping[str, Mapping[int, str]]


def models() -> list[Model]:
    """Return the models, with learned, sinusoidal and relative positions, and with audio."""
    torch.manual_seed(3)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    text = {"input_ids": torch.randint(3, 1000, (2, 9)), "attention_mask": mask}
    free = {name: {1: "encoder_sequence_length"} for name in text}
    sizes = {**_TOKENS, **_SIZES, "max_position_embeddings": 128}
    t5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4, "initializer_factor": 3.0}
    whisper = WhisperConfig(**_TOKENS, **_SIZES, num_mel_bins=8, max_source_positions=1500, max_target_positions=64)
    audio = {"input_features": torch.randn(2, 8, 3000)}
    built = (
        ("bart", BartForConditionalGeneration(BartConfig(**sizes)), text, free),
        ("marian", MarianMTModel(MarianConfig(**sizes)), text, free),
        ("t5", T5ForConditionalGeneration(T5Config(**_TOKENS, **t5)), text, free),
        ("whisper", WhisperForConditionalGeneration(whisper), audio, {}),
    )
    for _, model, _, _ in built:
        scale_weights(model)
    return [Model(name=name, model=model.eval(), given=given, free=axes) for name, model, given, axes in built]


@torch.no_grad()
def scale_weights(model: PreTrainedModel) -> None:
    """Let tokens depend more on each other and less on the encoder, so that greedy decoding does not repeat one."""
    for name, weight in model.named_parameters():
        if "encoder_attn.out_proj" in name:
            weight.mul_(0.1)
        if "decoder.embed_positions" in name or ("decoder" in name and "SelfAttention" in name):
            weight.mul_(3.0)


class Encoder(torch.nn.Module):
    """The encoder alone: its inputs to `last_hidden_state`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        """Return the encoder's output."""
        return self.encoder(*given).last_hidden_state


class Decoder(torch.nn.Module):
    """The decoder on the encoder's output, without a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the logits."""
        hidden = BaseModelOutput(last_hidden_state=encoder_hidden_states)
        masks = {} if mask is None else {"attention_mask": mask}
        masks["decoder_attention_mask"] = torch.ones_like(input_ids)  # or TorchScript has no operator for Whisper's
        return self.model(encoder_outputs=hidden, decoder_input_ids=input_ids, use_cache=False, **masks).logits


def write_graph(module: torch.nn.Module, given: Mapping[str, torch.Tensor], file: Path, **facts: Any) -> None:
    """Export a module by the exporter that the name of its folder says."""
    axes = {name: {0: "batch_size", **facts["free"].get(name, {})} for name in given}
    names = {"input_names": list(given), "output_names": [facts["output"]]}
    if "dynamo" in file.parent.name:
        shapes = tuple(axes.values())
        shapes = (shapes,) if isinstance(module, Encoder) else shapes
        program = torch.onnx.export(module, tuple(given.values()), dynamo=True, dynamic_shapes=shapes, **names)
        program.save(file)
        return
    free = {**axes, facts["output"]: {0: "batch_size", 1: facts["length"]}}
    torch.onnx.export(module, tuple(given.values()), file, dynamo=False, dynamic_axes=free, opset_version=17, **names)


def export(one: Model, folder: Path) -> None:
    """Write encoder, decoder and configs of a model to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    one.model.config.save_pretrained(folder)
    one.model.generation_config.save_pretrained(folder)
    encoder, decoder = Encoder(one.model).eval(), Decoder(one.model).eval()
    length = "encoder_sequence_length" if one.free else "source_positions"
    facts = {"free": one.free, "output": "last_hidden_state", "length": length}
    write_graph(encoder, one.given, folder / "encoder_model.onnx", **facts)
    given = {"input_ids": torch.randint(3, 1000, (2, 7)), "encoder_hidden_states": encoder(*one.given.values())}
    if "attention_mask" in one.given:
        given["encoder_attention_mask"] = one.given["attention_mask"]
    free = {name: {1: "encoder_sequence_length"} for name in given if name != "input_ids" and one.free}
    facts = {"free": {"input_ids": {1: "sequence_length"}, **free}, "output": "logits", "length": "sequence_length"}
    write_graph(decoder, given, folder / "decoder_model.onnx", **facts)


def tokens_of_files(folder: Path, given: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Return the tokens of greedy decoding with the exported files, without a cache."""
    encoder, decoder = (onnxruntime.InferenceSession(folder / f"{name}_model.onnx") for name in ("encoder", "decoder"))
    arrays = {name: tensor.numpy() for name, tensor in given.items()}
    feeds = {"encoder_hidden_states": encoder.run(None, arrays)[0]}
    if "attention_mask" in arrays:
        feeds["encoder_attention_mask"] = arrays["attention_mask"]
    ids = np.full((2, 1), _TOKENS["decoder_start_token_id"])
    for _ in range(NEW_TOKENS):
        logits = decoder.run(["logits"], {"input_ids": ids, **feeds})[0]
        ids = np.concatenate([ids, logits[:, -1:].argmax(-1)], axis=1)
    return ids


def generated_tokens(one: Model) -> np.ndarray:
    """Return the tokens of transformers' `generate`, without the tokens that a config suppresses."""
    one.model.generation_config.suppress_tokens = one.model.generation_config.begin_suppress_tokens = None
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1, "eos_token_id": None}
    return GenerationMixin.generate(one.model, **one.given, **options, forced_eos_token_id=None).numpy()


def main() -> None:
    """Export all models by both exporters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    warnings.simplefilter("ignore")  # of the tracer
    for one in models():
        expected = generated_tokens(one)
        print(one.name, "tokens", len(np.unique(expected)), "of", expected.shape)
        for exporter in ("torchscript", "dynamo"):
            folder = out / f"{one.name}_{exporter}"
            with torch.no_grad():
                export(one, folder)
            same = np.array_equal(tokens_of_files(folder, one.given), expected)
            print(f"{folder}: {'equal to' if same else 'DIFFERENT from'} generate of transformers", flush=True)


if __name__ == "__main__":
    main()
