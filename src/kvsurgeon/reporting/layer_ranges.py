"""Equal layers in one row: layers grouped by what is equal, and their numbers as ranges."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def group_layers(keys: Iterable[Key]) -> dict[Key, list[int]]:
    """Return the numbers of the layers with each key, in the order of the first ones."""
    groups: dict[Key, list[int]] = {}
    for layer, key in enumerate(keys):
        groups.setdefault(key, []).append(layer)
    return groups


def ranges_text(numbers: Sequence[int]) -> str:
    """Return ascending numbers as text, with runs as ranges.

    >>> ranges_text([0, 1, 2, 5]), ranges_text([0, 2, 4, 6]), ranges_text([3])
    ('0-2, 5', '0, 2, ..., 6', '3')
    """
    steps = {second - first for first, second in itertools.pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
