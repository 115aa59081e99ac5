"""The demo: inspect, inject, verify and generate with a small built-in model, in under a minute."""

from __future__ import annotations

import filecmp
import re
from pathlib import Path
from statistics import median

from rich.console import Console

from kvsurgeon import api
from kvsurgeon.errors import InputError, ParityError, UsageError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.reporting import table, terminal, time_plot
from kvsurgeon.reporting.progress import verification_progress
from kvsurgeon.runtime import Generation, Sampling, TextGenerator
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

BUILT_IN_MODEL = Path(__file__).parents[1] / "demo" / "model"
TOKENS = 400  # long enough to show that the time without a cache grows, short enough for a slow machine
LAST_TOKENS = 20  # tokens at the end whose times are compared
SAMPLING = Sampling(temperature=0.7, top_k=40, seed=7)


def write_export(output: Path) -> None:
    """Write the built-in model, an export without a cache, with its tokenizer and config to the folder `output`.

    Raises:
        UsageError: The folder has another model.
    """
    source = _built_in_model()
    there = output / "model.onnx"
    if there.exists() and not filecmp.cmp(there, source / "model.onnx", shallow=False):
        raise UsageError(f"expected no other model at `{there}`, found one; choose another folder by --output")
    path = api.save(api.load(source), output, source=source)
    print(f"written to {path}, without a cache; next: kvsurgeon inject {output} -o {output}-with-cache")


def show_demo(output: Path, *, tokens: int | None = None) -> None:
    """Run the demo, and write the model and the plot to `output`.

    Raises:
        ParityError: The generated text differs with the cache.
    """
    model = _built_in_model()
    console = terminal.console()
    console.print("[bold]1. inspect[/] a decoder that was exported without a cache")
    console.print(table.decoder_table(api.inspect(model)))
    console.print("[bold]2. inject[/] a cache, and verify the result against the original")
    with verification_progress() as progress:
        run = run_and_save(model, Pipeline((Inject(),)), output / "model", progress=progress)
    if run.verification is not None:
        console.print(table.report_table(run.verification))
    console.print(f"written to {run.path}", markup=False, soft_wrap=True)
    _compare(output, tokens or TOKENS, console)


def _compare(output: Path, tokens: int, console: Console) -> None:
    """Generate a text with and without the cache, and plot the time per token."""
    prompt = first_sentence((BUILT_IN_MODEL / "sample.txt").read_text("utf-8"))
    console.print(f"\n[bold]3. generate[/] {tokens} tokens with and without the cache")
    cached = _generate(output / "model", prompt, tokens)
    console.print(f"[dim]{prompt}[/]{cached.texts[0]}", markup=True, soft_wrap=True)
    uncached = _generate(BUILT_IN_MODEL, prompt, tokens)
    if cached.tokens != uncached.tokens:
        raise ParityError("the model of the demo generates another text with its cache")
    series = {
        f"without a cache: {uncached.tokens_per_second:.0f} tokens/s": _seconds(uncached),
        f"with a cache: {cached.tokens_per_second:.0f} tokens/s": _seconds(cached),
    }
    console.print("\n[bold]4. time per token[/] of the same text")
    console.print(time_plot.plot_text(series), markup=False)
    path = output / "time-per-token.png"
    time_plot.save_plot(series, path, title="Time per token of the same text")
    speedup = median(uncached.step_seconds[-LAST_TOKENS:]) / median(cached.step_seconds[-LAST_TOKENS:])
    console.print(f"speedup of the last tokens: {speedup:.0f}; plot: {path}", markup=False, soft_wrap=True)


def _built_in_model() -> Path:
    if not (BUILT_IN_MODEL / "model.onnx").is_file():
        raise InputError(f"expected the model of the demo at `{BUILT_IN_MODEL}`, found none; install kvsurgeon again")
    return BUILT_IN_MODEL


def first_sentence(text: str) -> str:
    """Return the text up to the end of its first sentence.

    >>> first_sentence("It was late. They left.")
    'It was late.'
    """
    return re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0]


def _generate(model: Path, prompt: str, tokens: int) -> Generation:
    return TextGenerator(model, stop=()).generate(prompt, max_new_tokens=tokens, sampling=SAMPLING)


def _seconds(made: Generation) -> tuple[float, ...]:
    return (made.prefill_seconds, *made.step_seconds)
