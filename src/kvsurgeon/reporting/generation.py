"""Generated text, printed token by token."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from kvsurgeon.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from kvsurgeon.runtime import Sampling, TextGenerator
    from kvsurgeon.runtime.text import Prompt


def print_generation(generator: TextGenerator, prompt: Prompt, *, max_new_tokens: int, sampling: Sampling) -> None:
    """Print the continuation of `prompt` token by token, after the prompt if it is text, and its speed on stderr."""
    if sys.stdout.isatty() and isinstance(prompt, str):
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


def print_all(generator: TextGenerator, path: Path, *, rows: int, max_new_tokens: int, sampling: Sampling) -> None:
    """Print the continuation of each line of a file when it is complete, and the speed of all on stderr.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"expected a text file of prompts, found none ({error}) - at `{path}`") from error
    start, count, texts = time.perf_counter(), 0, [""] * len(prompts)
    options = {"rows": rows, "max_new_tokens": max_new_tokens}
    for token in generator.stream_continuously(prompts, sampling=sampling, **options):
        texts[token.row] += token.text if generator.tokenizer else f" {token.id}"
        count += 1
        if token.finish:
            print(f"{token.row + 1}: {texts[token.row]}", flush=True)
    speed = count / (time.perf_counter() - start)
    print(f"{count} tokens of {len(prompts)} prompts, {speed:.1f} tokens/s", file=sys.stderr)
