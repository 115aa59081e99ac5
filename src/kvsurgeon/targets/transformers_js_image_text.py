"""transformers.js: `AutoModelForImageTextToText.from_pretrained(folder)`, whose decoder takes embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from kvsurgeon.targets.hugging_face_files import check_model_type
from kvsurgeon.targets.model_info import ModelInfo
from kvsurgeon.targets.parts import check_embedding, check_output
from kvsurgeon.targets.target import EMBEDDING, EMBEDDINGS, VISION, Incompatibility, warning
from kvsurgeon.targets.transformers_js import COUNTS_HIDDEN_LAYERS, TRANSFORMERS_JS, data_files_of_parts, own_config

# Source: the models of image-text-to-text (src/models/registry.js) and getNormalizedConfig (src/configs.js) of version
# 4.3.2: which of them count caches by the config of the text, and which by the config itself; these feed positions of
# three axes.
_OF_TEXT = frozenset((
    "llava", "llava_onevision", "paligemma", "gemma3", "idefics3", "smolvlm", "mistral3", "lighton_ocr",
))  # fmt: skip
_THREE_AXES = frozenset(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"))
_FALLBACK = ("llava", "LlavaForConditionalGeneration")  # model type and architecture in place of any other
_FEATURES = "image_features"
_IMAGE_TOKEN = ("image_token_index", "image_token_id")


def transformers_js_image_text_config(model: ModelInfo) -> Mapping[str, Any]:
    """Return a `config.json` by which transformers.js finds the caches, the image tokens and the data files."""
    config = {**model.config, **own_config(model.config, data_files_of_parts(model))}
    layers = {"num_hidden_layers": model.layers}
    if config.get("model_type") in _THREE_AXES:
        text = {"model_type": f"{config['model_type']}_text", **config.get("text_config", {}), **layers}
        return {**config, **layers, "text_config": text}
    if config.get("model_type") not in _OF_TEXT:
        config.setdefault("original_model_type", config.get("model_type"))
        config["model_type"], architecture = _FALLBACK
        config["architectures"] = [architecture]
    text = {**config.get("text_config", {}), **layers}
    if text.get("model_type") not in COUNTS_HIDDEN_LAYERS:
        text |= {"model_type": "llama", "multi_query": False}
    return {**config, "text_config": text}


def _check(model: ModelInfo) -> Iterator[Incompatibility]:
    config = transformers_js_image_text_config(model)
    yield from check_model_type(model, config, "transformers.js counts caches by the model type")
    has_three = config["model_type"] in _THREE_AXES
    positions = model.input("position_ids")
    if positions is not None and len(positions.dims) != 2 + has_three:
        wanted = "[3, batch, sequence]" if has_three else "[batch, sequence]"
        yield Incompatibility(
            f"expected {wanted} for model_type {config['model_type']}, found {list(positions.dims)}", at=positions.name
        )
    if has_three:
        yield warning(
            "transformers.js 4.3.2 gives tokens after a text without an image other positions than the next ones",
            at="position_ids",
        )
    mask = model.input("attention_mask")
    if mask is not None and len(mask.dims) != 2:
        yield Incompatibility(f"expected [batch, sequence], found {list(mask.dims)}", at=mask.name)
    if not any(name in config for name in _IMAGE_TOKEN):
        yield Incompatibility(
            "expected the id of image tokens, image_token_id, found none", at="config.json",
            hint="use the config of the image-text model, not of its text model",
        )  # fmt: skip
    vision = model.parts.get(VISION)
    if vision is not None:
        yield from check_output("vision encoder", vision, _FEATURES)


TRANSFORMERS_JS_IMAGE_TEXT = replace(
    TRANSFORMERS_JS,
    name="transformers-js-image-text",
    summary="AutoModelForImageTextToText.from_pretrained(folder) of @huggingface/transformers",
    file="onnx/decoder_model_merged.onnx",
    states=frozenset(),
    parts={EMBEDDING: "onnx/embed_tokens.onnx", VISION: "onnx/vision_encoder.onnx"},
    required=(EMBEDDINGS, "logits"),
    allowed_inputs=frozenset((EMBEDDINGS, "attention_mask", "position_ids", "num_logits_to_keep")),
    dtypes={**TRANSFORMERS_JS.dtypes, EMBEDDINGS: {"float32"}},
    side_files={"config.json": transformers_js_image_text_config},
    checks=(_check, partial(check_embedding, ids={"int64"})),
)
