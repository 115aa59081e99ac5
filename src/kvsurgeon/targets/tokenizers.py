"""Tokenizer files for clients whose version of transformers predates the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvsurgeon.targets.model_info import ModelInfo

CONFIG_FILE, TOKENIZER_FILE = "tokenizer_config.json", "tokenizer.json"
_CLASS = "tokenizer_class"
_SINCE_5, _BEFORE_5 = "TokenizersBackend", "PreTrainedTokenizerFast"  # transformers renamed the class in version 5


def tokenizer_config_before_5(model: ModelInfo) -> Mapping[str, Any] | None:
    """Return the tokenizer's config with the class name before transformers 5; None if it has another class."""
    config = model.source_files.get(CONFIG_FILE, {})
    return {**config, _CLASS: _BEFORE_5} if config.get(_CLASS) == _SINCE_5 else None


def tokenizer_with_text_merges(model: ModelInfo) -> Mapping[str, Any] | None:
    """Return the tokenizer with merges as texts, "a b", for clients that read no pairs; None to keep it as it is.

    A merge whose parts contain a space has no text form; such a tokenizer is kept as it is.
    """
    tokenizer = model.source_files.get(TOKENIZER_FILE, {})
    bpe = tokenizer.get("model")
    if not isinstance(bpe, dict):
        return None
    merges = bpe.get("merges", ())
    if not merges or not all(isinstance(pair, list) and not any(" " in part for part in pair) for pair in merges):
        return None
    return {**tokenizer, "model": {**bpe, "merges": [" ".join(pair) for pair in merges]}}
