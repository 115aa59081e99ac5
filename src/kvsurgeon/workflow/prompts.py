"""The short prompt on which plots and report pages show the inner values of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvsurgeon.runtime import Tokens
from kvsurgeon.runtime.text import Prompt, encode_prompt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROMPT = "The quick brown fox jumps over the lazy dog."
_MAX_TOKENS = 24  # rows of a legible plot
_DEFAULT_TOKENS = range(1, 10)  # IDs that any model knows, for a model without a tokenizer


@dataclass(frozen=True, kw_only=True)
class ShortPrompt:
    """The first tokens of a prompt.

    Attributes:
        ids: Token IDs, `[1, sequence]`.
        texts: Text or ID of each token.
    """

    ids: Tokens
    texts: tuple[str, ...]


def short_prompt(prompt: Prompt | None, tokenizer: Tokenizer | None) -> ShortPrompt:
    """Return the first tokens of a prompt, or of a default one.

    Raises:
        UsageError: The prompt is text and there is no tokenizer, or it is empty.
    """
    if prompt is None:
        prompt = PROMPT if tokenizer is not None else _DEFAULT_TOKENS
    ids = encode_prompt(prompt, tokenizer)[:_MAX_TOKENS]
    return ShortPrompt(ids=np.array([ids], np.int64), texts=tuple(_text(tokenizer, token) for token in ids))


def _text(tokenizer: Tokenizer | None, token: int) -> str:
    text = str(token) if tokenizer is None else tokenizer.decode([token], skip_special_tokens=False)
    return text.replace("\n", "↵").strip() or "␣"
