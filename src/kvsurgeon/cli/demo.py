"""The demo: everything that kvsurgeon does, on a small model that comes along, in under a minute."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median

from rich.console import Console

from kvsurgeon import api
from kvsurgeon.errors import InputError, ParityError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.report import plot, progress, table
from kvsurgeon.runtime import Generation, Sampling, Writer
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.surgery import operate

SHIPPED = Path(__file__).parents[1] / "demo" / "model"
TOKENS = 400  # long enough to see time without a cache grow, short enough for a slow machine
LAST = 20  # tokens at the end whose times are compared
SAMPLING = Sampling(temperature=0.7, top_k=40, seed=7)


def show_demo(output: Path, *, tokens: int | None = None) -> None:
    """Inspect, inject, verify and generate, saying what is done; the model and the plot are then in `output`.

    Raises:
        ParityError: With the cache other words come out than without.
    """
    if not (SHIPPED / "model.onnx").is_file():
        raise InputError(f"expected the demo's model, found none at `{SHIPPED}`; install kvsurgeon again")
    console = table.console()
    console.print("[bold]1. inspect[/] a decoder that was exported without a cache")
    console.print(table.anatomy(api.inspect(SHIPPED)))
    console.print("[bold]2. inject[/] a cache, and let the judge decide whether it still computes the same")
    with progress.judging() as told:
        surgery = operate(SHIPPED, Pipeline((Inject(),)), output / "model", progress=told)
    if surgery.report is not None:
        console.print(table.verification(surgery.report))
    console.print(table.surgery(surgery))
    _compare(output, tokens or TOKENS, console)


def _compare(output: Path, tokens: int, console: Console) -> None:
    """Generate the same text both ways, and plot what each token took."""
    prompt = first_sentence((SHIPPED / "sample.txt").read_text("utf-8"))
    console.print(f"\n[bold]3. generate[/] {tokens} tokens with the cache, and the same without")
    with_cache = _generated(output / "model", prompt, tokens)
    console.print(f"[dim]{prompt}[/]{with_cache.texts[0]}", markup=True, soft_wrap=True)
    without = _generated(SHIPPED, prompt, tokens)
    if with_cache.tokens != without.tokens:
        raise ParityError("the demo's model writes other words with its cache than without")
    series = {
        f"without a cache: {without.tokens_per_second:.0f} tokens/s": _seconds(without),
        f"with a cache: {with_cache.tokens_per_second:.0f} tokens/s": _seconds(with_cache),
    }
    console.print("\n[bold]4. time per token[/], the same words both ways")
    console.print(plot.in_terminal(series), markup=False)
    path = plot.as_png(series, output / "time-per-token.png", title="Time per token, the same words both ways")
    faster = median(without.step_seconds[-LAST:]) / median(with_cache.step_seconds[-LAST:])
    console.print(f"the last tokens came {faster:.0f} times faster; the plot is {path}, the model {output / 'model'}")


def first_sentence(text: str) -> str:
    """Return the text up to the end of its first sentence.

    >>> first_sentence("It was late. They left.")
    'It was late.'
    """
    return re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0]


def _generated(model: Path, prompt: str, tokens: int) -> Generation:
    return Writer(model, stop=()).generate(prompt, max_new_tokens=tokens, sampling=SAMPLING)


def _seconds(made: Generation) -> tuple[float, ...]:
    return (made.prefill_seconds, *made.step_seconds)
