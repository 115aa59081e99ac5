"""Tokenizers in words that clients know which were written before their files were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvsurgeon.targets.facts import Facts
from kvsurgeon.targets.target import SideFile

CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
_CLASS = "tokenizer_class"
_SINCE_5, _BEFORE = "TokenizersBackend", "PreTrainedTokenizerFast"  # one class of transformers, renamed in version 5


def class_before_5(facts: Facts) -> Mapping[str, Any] | None:
    """Return a tokenizer's config by the class name that transformers had for it before; None where it has that."""
    said = facts.beside.get(CONFIG, {})
    return {**said, _CLASS: _BEFORE} if said.get(_CLASS) == _SINCE_5 else None


def merges_as_text(facts: Facts) -> Mapping[str, Any] | None:
    """Return a tokenizer whose merges are texts, "a b", as pairs were not read before; None where they are so.

    A merge of parts that hold a space cannot be said as a text; such a tokenizer is left as it is.
    """
    said = facts.beside.get(TOKENIZER, {})
    model = said.get("model")
    if not isinstance(model, dict):
        return None
    merges = model.get("merges", ())
    if not merges or not all(isinstance(pair, list) and not any(" " in part for part in pair) for pair in merges):
        return None
    return {**said, "model": {**model, "merges": [" ".join(pair) for pair in merges]}}


CONFIG_BEFORE_5 = SideFile(name=CONFIG, write=class_before_5)
MERGES_AS_TEXT = SideFile(name=TOKENIZER, write=merges_as_text)
