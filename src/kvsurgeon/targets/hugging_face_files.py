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


def tokenizer_config_before_5(model: ModelInfo) -> Mapping[str, Any] | None:
    """Return the tokenizer's config with the class name before transformers 5; None if it has another class."""
    config = model.source_files.get("tokenizer_config.json", {})
    return {**config, _CLASS: _BEFORE_5} if config.get(_CLASS) == _SINCE_5 else None


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
