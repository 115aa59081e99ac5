"""Sweeps: the accuracy loss and the size of the cache for several values of options."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvsurgeon.errors import UsageError
from kvsurgeon.parity import AccuracyLoss, Progress
from kvsurgeon.runtime import Source
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

_CHOICES = re.compile(r"(?<==)[^{},|=]*(?:\|[^{},|=]*)+")  # values of an option, with `|` between them


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """The result of one pipeline of a sweep.

    Attributes:
        passes: The pipeline; empty for the original.
        cache_bytes: Bytes of the cache of a sequence of `CACHE_TOKENS` tokens.
        loss: The accuracy loss; None if the results are the same.
    """

    passes: str
    cache_bytes: int
    loss: AccuracyLoss | None

    @property
    def kl_divergence(self) -> float:
        """Mean KL divergence from the original, in nats per token."""
        return 0.0 if self.loss is None else self.loss.kl_divergence

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


def expand_choices(passes: str) -> list[str]:
    """Return the pipelines of a text in which options have several values.

    >>> expand_choices("window-cache{window=64|128,sinks=4}")
    ['window-cache{window=64,sinks=4}', 'window-cache{window=128,sinks=4}']
    """
    parts = _CHOICES.split(passes)
    values = [found.split("|") for found in _CHOICES.findall(passes)]
    return [
        "".join(itertools.chain.from_iterable(itertools.zip_longest(parts, chosen, fillvalue="")))
        for chosen in itertools.product(*values)
    ]


def sweep(
    source: Source, passes: str, *, text: str | Path | None = None, progress: Progress | None = None
) -> Iterator[SweepPoint]:
    """Yield the original, and the results of pipelines on it, each verified; nothing is written.

    Args:
        source: The model.
        passes: A pipeline in which options have several values, with `|` between them.
        text: A text file: its first half to calibrate passes on, the second to measure the loss.
        progress: Called by the verifier before each scenario, and before each window of the text.

    Raises:
        UsageError: The text of the passes is malformed, or they do not state the size of the cache.
        UnsupportedError: A pass does not support the model, or does not change it.
        ParityError: The results differ for another reason than the weights.
    """
    for number, one in enumerate(expand_choices(passes)):
        run = run_and_save(source, Pipeline.parse(one), text=text, progress=progress)
        if run.cache_bytes is None:
            raise UsageError(f"expected passes that state the size of the cache, found {one}")
        before, after = run.cache_bytes
        if not number:
            yield SweepPoint(passes="", cache_bytes=before, loss=None)
        yield SweepPoint(passes=one, cache_bytes=after, loss=run.loss)
