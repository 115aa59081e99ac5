"""Text on its way: shown as it is made, and then how fast it was."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvsurgeon.runtime import Sampling, Writer


def show(writer: Writer, prompt: str, *, max_new_tokens: int, sampling: Sampling) -> None:
    """Print the continuation of `prompt` as it is made; its speed goes to the error output."""
    if sys.stdout.isatty():
        sys.stdout.write(prompt)
    made = writer.generate(
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        on_token=lambda one: _put(one.text if writer.tokenizer else f" {one.id}"),
    )
    _put("\n")
    how = "with a cache" if made.cached else "without a cache"
    print(f"{len(made.tokens[0])} tokens {how}, {made.tokens_per_second:.1f} tokens/s", file=sys.stderr)


def _put(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
