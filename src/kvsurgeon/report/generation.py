"""Generated text, printed token by token."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvsurgeon.runtime import Sampling, TextGenerator


def print_generation(generator: TextGenerator, prompt: str, *, max_new_tokens: int, sampling: Sampling) -> None:
    """Print the continuation of `prompt` token by token, and its speed on stderr."""
    if sys.stdout.isatty():
        sys.stdout.write(prompt)
    made = generator.generate(
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        on_token=lambda token: print(token.text if generator.tokenizer else f" {token.id}", end="", flush=True),
    )
    print(flush=True)
    cache = "with a cache" if made.cached else "without a cache"
    print(f"{len(made.tokens[0])} tokens {cache}, {made.tokens_per_second:.1f} tokens/s", file=sys.stderr)
