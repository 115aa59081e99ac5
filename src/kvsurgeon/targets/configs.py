"""Helpers for the `config.json` of clients that derive the shape of the cache from the model type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvsurgeon.targets.model_info import ModelInfo
from kvsurgeon.targets.target import Incompatibility, warning

_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def with_unknown_tokens(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config with null for special tokens that it lacks, so that its model type sets no defaults."""
    return {**dict.fromkeys(_SPECIAL_TOKENS), **config}


def check_model_type(model: ModelInfo, config: Mapping[str, Any], reason: str) -> Iterator[Incompatibility]:
    """Warn if the model type of the written config is not that of the source."""
    original = model.config.get("model_type")
    if config.get("model_type") != original:
        source = "no config" if original is None else f"model_type {original}"
        yield warning(
            f"{reason}: config.json has model_type {config.get('model_type')}, the source has {source}",
            at="config.json",
        )
