"""Operators that are not ONNX's own: a compiler may know none of them, and its documentation need not say."""

from __future__ import annotations

from collections.abc import Iterator

from kvsurgeon.targets.facts import Facts
from kvsurgeon.targets.target import Obstacle

OWN = ("", "ai.onnx")


def foreign_operators(facts: Facts) -> Iterator[Obstacle]:
    """Yield which operators are none of ONNX's own; nothing is stopped by them."""
    found = {f"{domain}.{operator}": at for (domain, operator), at in facts.operators.items() if domain not in OWN}
    if found:
        yield Obstacle(
            what=f"{', '.join(sorted(found))}: no operators of ONNX, which the compiler may not have",
            at=next(iter(found.values())),
            stops=False,
        )
