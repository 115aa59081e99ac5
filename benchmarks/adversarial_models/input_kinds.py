"""Decoders that read an input of positions: the largest or last of them, which later tokens change, or each alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random

from adversarial_models.decoder import Context, Design
from adversarial_models.draft import Draft

POSITIONS = "position_ids"  # [B, S]
THRESHOLDS = (40, 130, 300, 700, 1500)
Factor = Callable[[Context, str, int], str]
"""Takes positions as float32 [B, S] or [B, 1], and a threshold; returns a factor of the same shape."""


@dataclass(frozen=True, kw_only=True)
class InputKind:
    """A factor that is computed from positions; of an adversarial decoder, from the largest or last of a text."""

    name: str
    factor: Factor


def draw_input_kind(random: Random, kind: InputKind, design: Design, *, benign: bool) -> Draft:
    """Return a decoder that scales a value by a function of its positions."""
    place, at = random.choice(("hidden", "query", "key", "scores", "output", "logits")), random.choice(THRESHOLDS)
    reduction = "each" if benign else random.choice(["ReduceMax", "last"])

    def change(context: Context, value: str) -> str:
        write = context.write
        positions = write.to_float(POSITIONS)
        if reduction == "last":
            positions = write("Slice", positions, [-1], [2**62], [1])
        elif reduction != "each":
            positions = write.reduce(reduction, positions, [1])
        axes = [1, 3] if place in ("query", "key", "scores") else [2]
        return str(write("Mul", value, write("Unsqueeze", kind.factor(context, positions, at), axes)))

    design = replace(design, takes_positions=True, changes={place: change})
    return Draft(design=design, place=place, threshold=at, variant=f"{kind.name} {reduction}")


def _compared(context: Context, positions: str, at: int) -> str:
    return str(context.write("Where", context.write("Greater", positions, float(at)), 1.5, 1.0))


def _logarithm(context: Context, positions: str, at: int) -> str:
    write = context.write
    shifted = write("Div", write("Add", positions, 1.0), float(at))
    return str(write("Max", write("Add", write("Log", shifted), 1.0), 1.0))


def _linear(context: Context, positions: str, at: int) -> str:
    return str(context.write("Add", context.write("Mul", positions, 1 / at), 1.0))


KINDS: Mapping[str, InputKind] = {
    kind.name: kind
    for kind in (
        InputKind(name="compared", factor=_compared),
        InputKind(name="logarithm", factor=_logarithm),
        InputKind(name="linear", factor=_linear),
    )
}
