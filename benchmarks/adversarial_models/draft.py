"""A drawn decoder: its design, and what was changed in it."""

from __future__ import annotations

from dataclasses import dataclass

from adversarial_models.decoder import Design


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A design, with the change, its place, and the length from which on it has an effect."""

    design: Design
    place: str
    threshold: int | None
    variant: str
