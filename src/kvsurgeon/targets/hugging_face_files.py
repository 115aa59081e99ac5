"""Model and tokenizer files of Hugging Face, adapted to clients."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from kvsurgeon.targets.model_info import ModelInfo
from kvsurgeon.targets.target import Incompatibility, warning

_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CLASS = "tokenizer_class"
_SINCE_5, _BEFORE_5 = "TokenizersBackend", "PreTrainedTokenizerFast"  # transformers renamed the class in version 5


def with_unknown_tokens(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config with null for special tokens that it lacks, so that its model type sets no defaults."""
    return {**dict.fromkeys(_SPECIAL_TOKENS), **config}


def in_strict_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a config without those that contain `Infinity` or `NaN`, which browsers cannot read."""
    return {name: value for name, value in config.items() if _is_strict_json(value)}


def _is_strict_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def check_model_type(model: ModelInfo, config: Mapping[str, Any], reason: str) -> Iterator[Incompatibility]:
    """Warn if the model type of the written config is not that of the source."""
    original, written = model.config.get("model_type"), config.get("model_type")
    if written != original:
        source = "no config" if original is None else f"model_type {original}"
        yield warning(f"{reason}: config.json has model_type {written}, the source has {source}", at="config.json")


def check_left_padding(model: ModelInfo) -> Iterator[Incompatibility]:
    """Warn if a client cannot pad the prompts of a batch on the left."""
    if "attention_mask" not in model.input_names:
        yield warning("the model has no input attention_mask: all prompts of a batch must have the same length")
    elif "position_ids" not in model.input_names:
        yield warning(
            "the model has no input position_ids: left padding shifts the positions that it counts",
            hint="run add-position-ids first",
        )


def tokenizer_config_before_5(model: ModelInfo) -> Mapping[str, Any] | None:
    """Return the tokenizer's config with the class name before transformers 5; None if it has another class."""
    config = model.source_files.get("tokenizer_config.json", {})
    return {**config, _CLASS: _BEFORE_5} if config.get(_CLASS) == _SINCE_5 else None


def with_tokenizer_class(model: ModelInfo) -> Mapping[str, Any] | None:
    """Return the tokenizer's config with a class that reads `tokenizer.json` as it is, if it names none."""
    config = model.source_files.get("tokenizer_config.json", {})
    return tokenizer_config_before_5(model) if _CLASS in config else {**config, _CLASS: _BEFORE_5}


def with_chat_template(model: ModelInfo, config: Mapping[str, Any] | None = None) -> Mapping[str, Any] | None:
    """Return the tokenizer's config with the chat template, for clients that read it there only; None to keep it.

    Args:
        model: The model.
        config: The config, if it is not that of the source.
    """
    known = model.source_files.get("tokenizer_config.json", {}) if config is None else config
    if model.chat_template is None or "chat_template" in known:
        return config
    return {**known, "chat_template": model.chat_template}


def tokenizer_with_text_merges(model: ModelInfo) -> Mapping[str, Any] | None:
    """Return the tokenizer with merges as texts, "a b", for clients that read no pairs; None to keep it.

    A merge whose parts contain a space has no text form; such a tokenizer is kept.
    """
    tokenizer = model.source_files.get("tokenizer.json", {})
    bpe = tokenizer.get("model")
    if not isinstance(bpe, dict):
        return None
    merges = bpe.get("merges", ())
    if not merges or not all(isinstance(pair, list) and not any(" " in part for part in pair) for pair in merges):
        return None
    return {**tokenizer, "model": {**bpe, "merges": [" ".join(pair) for pair in merges]}}
