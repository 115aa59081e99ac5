"""Other inputs than those of a usual run: masked tokens, larger batches, and other numbers in inputs without tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from kvsurgeon.analysis.attention.mask_forms import MANY
from kvsurgeon.analysis.mask_patterns import (
    MaskPattern,
    left_padded,
    padded_until,
    padded_with_gaps,
    unmasked,
    with_gaps,
)
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.proof.length_sweep import LengthSweep

NUMBERS = (-1.0, 0.0, 1.0, 2.0, 3.0)  # that an input without tokens may hold


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Contents of the inputs of a run.

    Attributes:
        mask: The tokens that the mask inputs mask.
        sequence: Index of the only sequence that is masked; None for all.
        batch: Number of sequences.
        number: The elements of inputs without tokens; None for those of their roles.
    """

    mask: MaskPattern = unmasked
    sequence: int | None = None
    batch: int = 2
    number: float | None = None


def other_inputs(sweep: LengthSweep, masks: Collection[InputRole], lengths: Collection[int]) -> list[Inputs]:
    """Return what else the inputs may hold: larger batches, and numbers, lengths among them."""
    found = [Inputs(batch=batch) for batch in sweep.batches]
    return found + [Inputs(number=number) for number in other_numbers(sweep, masks, lengths)]


def masked_inputs(masks: Collection[InputRole], sequences: Collection[int], padding: int = 0) -> list[Inputs]:
    """Return inputs without masked tokens and, if there are mask inputs, with some: in one sequence, and in all.

    Args:
        masks: The mask inputs.
        sequences: Indices of the sequences of which one alone can be masked.
        padding: A further number of tokens of padding; none if 0.
    """
    padded = (left_padded, *([padded_until(padding)] if padding else []))
    alone = [Inputs(mask=mask, sequence=sequence) for mask in padded for sequence in sequences]
    patterns = (*padded, with_gaps, padded_with_gaps) if masks else ()
    return [*alone, *(Inputs(mask=mask) for mask in (unmasked, *patterns))]


def other_numbers(sweep: LengthSweep, inputs: Iterable[InputRole], lengths: Collection[int]) -> list[float]:
    """Return numbers that the inputs without tokens may hold, lengths among them; none if there are no such inputs."""
    given_once = [given.value for given in inputs if not given.lengths]
    if not given_once:
        return []
    numbers = {*NUMBERS, *lengths, *sweep.numbers, *(count + 1 for count in sweep.numbers)}
    if all(value.dtype is not None and not value.dtype.is_floating_point() for value in given_once):
        numbers |= {-MANY, MANY}  # as a factor of scores, it would outweigh a mask
    return sorted(numbers)
