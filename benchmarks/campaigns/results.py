"""Collect the results of many models, and count them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

SAVED_EVERY = 25  # results

Result = TypeVar("Result")


def collect(
    results: Iterable[Result], save: Callable[[Sequence[Result]], None] | None, *, known: Sequence[Result] = ()
) -> list[Result]:
    """Return the known results and the others; `save` gets those so far every 25 of them, and all at the end."""
    collected = list(known)
    for result in results:
        collected.append(result)
        if save and len(collected) % SAVED_EVERY == 0:
            save(collected)
    if save:
        save(collected)
    return collected


def print_counts(title: str, found: Sequence[tuple[str, str]], columns: Sequence[str]) -> None:
    """Print how often each kind has each verdict: pairs of a kind and a verdict."""
    print(f"\n{title:32}", *(f"{column:>13}" for column in columns))
    for kind in [*sorted({kind for kind, _ in found}), "all"]:
        counts = Counter(verdict for one, verdict in found if kind in ("all", one))
        print(f"{kind:32}", *(f"{counts[column] or '.':>13}" for column in columns))
