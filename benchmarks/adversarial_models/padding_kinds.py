"""Decoders that treat padded sequences, or later ones of a batch, otherwise in long texts or at late positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random

from adversarial_models.decoder import Context, Design
from adversarial_models.draft import Draft

MASK = "attention_mask"  # [B, S]
THRESHOLDS = (40, 130, 300, 700)
AHEAD = 3  # tokens that an open query reads
Sequences = Callable[[Context], str]
"""Returns which sequences are treated otherwise: bool [B, 1]."""


@dataclass(frozen=True, kw_only=True)
class PaddingKind:
    """Sequences that are treated otherwise beyond a threshold.

    Attributes:
        name: Name of the kind.
        sequences: The sequences.
    """

    name: str
    sequences: Sequences


def draw_padding_kind(random: Random, kind: PaddingKind, design: Design, *, benign: bool) -> Draft:
    """Return a decoder that opens later keys to such sequences, or scales a value of them by the length.

    Of its benign counterpart, such sequences have a window, or a factor of their own, beyond a position.
    """
    at = random.choice(THRESHOLDS)
    place = random.choice(["allowed", "hidden", "output", "logits"])
    late = "position" if benign else random.choice(["length", "position"] if place == "allowed" else ["length"])

    def change(context: Context, value: str) -> str:
        write = context.write
        where = kind.sequences(context)
        if place == "allowed":
            beyond = write("Greater", context.total if late == "length" else context.query_positions, at)
            here = write("And", write("Unsqueeze", where, [1, 2]), beyond)
            if benign:
                near = write("Greater", context.key_positions, write("Sub", context.query_positions, AHEAD))
                return str(write("And", value, write("Or", write("Not", here), near)))
            near = write("Less", context.key_positions, write("Add", context.query_positions, AHEAD))
            return str(write("Or", value, write("And", here, near)))
        beyond = write("Greater", context.total if late == "length" else write("Unsqueeze", context.positions, [0]), at)
        factor = write("Where", write("And", where, beyond), 1.5, 1.0)
        return str(write("Mul", value, write("Unsqueeze", factor, [2])))

    design = replace(design, has_mask=True, changes={place: change})
    return Draft(design=design, place=place, threshold=at, variant=f"{kind.name} beyond a {late}")


def _padded(context: Context) -> str:
    """Return which sequences begin with a masked token, [B, 1]."""
    write = context.write
    return str(write("Equal", write("Slice", MASK, [0], [1], [1]), 0))


def _with_masked_token(context: Context) -> str:
    """Return which sequences have a masked token, [B, 1]."""
    write = context.write
    count = write.reduce("ReduceSum", MASK, [1])
    return str(write("Less", count, context.total))


def _later_sequences(context: Context) -> str:
    """Return which sequences are the third of a batch or later ones, [B, 1]."""
    return _sequences_after(context, 1)


def _seventh_sequence(context: Context) -> str:
    """Return which sequences are the seventh of a batch or later ones, [B, 1]."""
    return _sequences_after(context, 5)


def _sequences_after(context: Context, number: int) -> str:
    write = context.write
    numbers = write("Range", 0, write("Squeeze", write("Gather", write("Shape", "input_ids"), [0]), [0]), 1)
    return str(write("Unsqueeze", write("Greater", numbers, number), [1]))


KINDS: Mapping[str, PaddingKind] = {
    kind.name: kind
    for kind in (
        PaddingKind(name="padded", sequences=_padded),
        PaddingKind(name="with-masked-token", sequences=_with_masked_token),
        PaddingKind(name="later-sequences", sequences=_later_sequences),
        PaddingKind(name="seventh-sequence", sequences=_seventh_sequence),
    )
}
