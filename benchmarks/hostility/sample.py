"""A drawn decoder, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass

from hostility.decoder import Design


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A design, with what was put in, where, and from which length on it matters."""

    design: Design
    place: str
    threshold: int | None
    spelling: str
