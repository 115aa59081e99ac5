"""Export small image-text models as an embedding and a decoder, inject the decoder, and compare with transformers.

The parts are those that transformers.js and onnxruntime-genai load: `embed_tokens.onnx` looks up token ids, and
`decoder_model.onnx` takes `inputs_embeds`, in which the application has replaced the rows of image tokens by the output
of the vision encoder, `vision_encoder.onnx` (written for LLaVA). Only the decoder has a cache. Greedy decoding with the
injected decoder must give the tokens of `generate` of transformers on a text with an image.

    pip install torch transformers onnxscript onnxruntime kvsurgeon
    python examples/image_text.py OUT
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from transformers import PreTrainedModel

import kvsurgeon

EXPORTERS = ("torchscript", "dynamo")
NEW_TOKENS, WIDTH, WINDOW, IMAGE = 32, 32, 8, 150
PATCH, SIDE = 14, 28
TEXT = {"vocab_size": 160, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}  # fmt: skip
VISION = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": SIDE, "patch_size": PATCH}  # fmt: skip
QWEN_VISION = {"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 4, "mlp_ratio": 2,
               "patch_size": PATCH, "spatial_merge_size": 2}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Model:
    """A small model with random weights, and a text with one image.

    Attributes:
        model: The model.
        given: What `generate` is given.
        masks: Returns the mask inputs of a call: of the model, the number of tokens before the new ones, and of all.
    """

    model: PreTrainedModel
    given: Mapping[str, torch.Tensor]
    masks: Callable[[Model, int, int], dict[str, torch.Tensor]]


def padding_mask(_: Model, __: int, total: int) -> dict[str, torch.Tensor]:
    """Return a mask of all tokens so far: the decoder is causal, images included."""
    return {"attention_mask": torch.ones(1, total, dtype=torch.int64)}


def masks_of_blocks(one: Model, first: int, total: int) -> dict[str, torch.Tensor]:
    """Return masks of the new tokens against all so far, for layers without a window and with one.

    Tokens of an image attend to each other both ways, so the call that has one of them must have all: the first.
    """
    query, key = torch.arange(first, total)[:, None], torch.arange(total)
    is_image = torch.zeros(total, dtype=torch.bool)
    is_image[: one.given["input_ids"].shape[1]] = one.given["input_ids"][0] == IMAGE
    attends = (key <= query) | (is_image[first:, None] & is_image)
    in_window = key > query - WINDOW
    hidden = {"attention_mask": ~attends, "sliding_mask": ~(attends & in_window)}
    return {name: torch.zeros(where.shape).masked_fill(where, -1e9)[None, None] for name, where in hidden.items()}


def llava() -> Model:
    """Return a LLaVA: a row of the text for each patch of the image, positions counted on."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE, image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    image = {"pixel_values": torch.randn(1, 3, SIDE, SIDE)}
    model = transformers.LlavaForConditionalGeneration(config)
    return Model(model=model, given=with_text(image, patches=4), masks=padding_mask)


def qwen2_vl() -> Model:
    """Return a Qwen2-VL: positions of three axes, which a text goes on with after the longest side of the image."""
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rotary}, vision_config=QWEN_VISION, image_token_id=IMAGE,
        video_token_id=151, vision_start_token_id=152, vision_end_token_id=153,
    )  # fmt: skip
    grid = torch.tensor([[1, 4, 6]])
    image = {"pixel_values": torch.randn(24, 3 * 2 * PATCH * PATCH), "image_grid_thw": grid}
    given = with_text(image, patches=6)
    given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).int()
    return Model(model=transformers.Qwen2VLForConditionalGeneration(config), given=given, masks=padding_mask)


def gemma3() -> Model:
    """Return a Gemma 3: tokens of an image attend to each other both ways, so the application gives the masks."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
    config = transformers.Gemma3Config(
        text_config={**TEXT, **kinds}, vision_config={**VISION, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=152, eoi_token_index=153,
        tie_word_embeddings=False,
    )  # fmt: skip
    given = with_text({"pixel_values": torch.randn(1, 3, SIDE, SIDE)}, patches=4)
    given["token_type_ids"] = (given["input_ids"] == IMAGE).int()
    return Model(model=transformers.Gemma3ForConditionalGeneration(config), given=given, masks=masks_of_blocks)


MODELS = {"llava": llava, "qwen2_vl": qwen2_vl, "gemma3": gemma3}


def with_text(image: Mapping[str, torch.Tensor], *, patches: int) -> dict[str, torch.Tensor]:
    """Return inputs with a text around the tokens that stand for the patches of an image."""
    around = torch.randint(4, 140, (9,))
    start, end = torch.tensor([152]), torch.tensor([153])
    ids = torch.cat([around[:4], start, torch.full((patches,), IMAGE), end, around[4:]])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image}


class Decoder(torch.nn.Module):
    """The decoder alone, on embeddings."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.decoder, self.head = model.model.language_model, model.lm_head

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor,
        sliding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return the logits."""
        masks: Any = attention_mask
        if sliding_mask is not None:
            masks = {"full_attention": attention_mask, "sliding_attention": sliding_mask}
        given = {"attention_mask": masks, "position_ids": position_ids, "use_cache": False}
        return self.head(self.decoder(inputs_embeds=inputs_embeds, **given).last_hidden_state)


class VisionEncoder(torch.nn.Module):
    """The part that computes the rows of an image."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the rows of all images, `[rows, width]`."""
        return torch.cat(self.model.get_image_features(pixel_values).pooler_output)


def first_call(one: Model) -> dict[str, torch.Tensor]:
    """Return what the decoder of transformers is given in the first call for this text."""
    seen: dict[str, torch.Tensor] = {}

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        seen.update({name: given[name] for name in ("inputs_embeds", "position_ids")})

    handle = one.model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        one.model(**one.given)
    handle.remove()
    length = one.given["input_ids"].shape[1]
    if seen["position_ids"] is None:
        seen["position_ids"] = torch.arange(length)[None]
    return {**seen, **one.masks(one, 0, length)}


def export(one: Model, exporter: str, folder: Path) -> None:
    """Write both parts."""
    folder.mkdir(parents=True, exist_ok=True)
    one.model.config.to_json_file(folder / "config.json")
    ids, embed = {"input_ids": one.given["input_ids"]}, one.model.get_input_embeddings()
    write_graph(embed, ids, "inputs_embeds", exporter, folder / "embed_tokens.onnx")
    if set(one.given) == {"input_ids", "attention_mask", "pixel_values"}:
        image = {"pixel_values": one.given["pixel_values"]}
        write_graph(VisionEncoder(one.model), image, "image_features", exporter, folder / "vision_encoder.onnx")
    write_graph(Decoder(one.model).eval(), first_call(one), "logits", exporter, folder / "decoder_model.onnx")


def free_axes(name: str, tensor: torch.Tensor) -> dict[int, str]:
    """Return the axes of a tensor that have any size."""
    if name == "position_ids":  # of one axis, or of three
        return {tensor.ndim - 2: "batch", tensor.ndim - 1: "sequence"}
    if name == "pixel_values":
        return {}
    tokens = (2, 3) if tensor.ndim == 4 else (1,)  # a mask of queries against keys, or one of tokens
    return {0: "batch", **dict.fromkeys(tokens, "sequence")}


def write_graph(
    module: torch.nn.Module, given: Mapping[str, torch.Tensor], output: str, exporter: str, file: Path
) -> None:
    """Export a module for any batch and length, or for one image."""
    axes = {name: free_axes(name, tensor) for name, tensor in given.items()}
    twice = tuple(torch.cat([one] * 2, dim=min(axes[name])) if axes[name] else one for name, one in given.items())
    names: dict[str, Any] = {"input_names": list(given), "output_names": [output]}
    if exporter == "dynamo":
        shapes = tuple({axis: torch.export.Dim(size) for axis, size in free.items()} for free in axes.values())
        torch.onnx.export(module, twice, file, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    else:
        axes[output] = {0: "rows"} if output == "image_features" else {0: "batch", 1: "sequence"}
        torch.onnx.export(module, twice, file, dynamo=False, dynamic_axes=axes, opset_version=17, **names)


def decoded(one: Model, folder: Path) -> list[int]:
    """Return the tokens of greedy decoding: the image and the text in the first call, one token in each other."""
    embed, decode = (onnxruntime.InferenceSession(folder / name) for name in ("embed_tokens.onnx", "model.onnx"))
    feeds = {name: tensor.numpy() for name, tensor in first_call(one).items()}
    pasts = [given for given in decode.get_inputs() if given.name.startswith("past_key_values.")]
    caches = [np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32) for given in pasts]
    tokens: list[int] = []
    while len(tokens) < NEW_TOKENS:
        logits, *caches = decode.run(
            None, feeds | {given.name: rows for given, rows in zip(pasts, caches, strict=True)}
        )
        tokens.append(int(logits[0, -1].argmax()))
        feeds["inputs_embeds"] = embed.run(None, {"input_ids": np.array([tokens[-1:]])})[0]
        positions, total = feeds["position_ids"], one.given["input_ids"].shape[1] + len(tokens)
        feeds["position_ids"] = np.full_like(positions[..., -1:], positions.max() + 1)
        feeds |= {name: tensor.numpy() for name, tensor in one.masks(one, total - 1, total).items()}
    return tokens


def main() -> int:
    """Export, inject and compare all models; return 1 if tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=MODELS, action="append")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of the tracer
    different = 0
    for name in args.only or MODELS:
        torch.manual_seed(1)
        one = MODELS[name]()
        one.model.eval()
        with torch.no_grad():
            for parameter, weight in one.model.named_parameters():
                if weight.ndim == 2 and "norm" not in parameter:  # so that tokens attend to few others
                    weight.normal_(std=0.25)
        one.model.generation_config.eos_token_id = None
        expected = one.model.generate(**one.given, max_new_tokens=NEW_TOKENS, do_sample=False)[0, -NEW_TOKENS:].tolist()
        for exporter in EXPORTERS:
            folder = args.out / f"{name}_{exporter}"
            with torch.no_grad():
                export(one, exporter, folder)
            kvsurgeon.inject(folder / "decoder_model.onnx", folder / "model.onnx")
            same = decoded(one, folder) == expected
            different += not same
            print(f"{folder}: {len(set(expected))} tokens {'equal to' if same else 'DIFFERENT from'} generate")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
