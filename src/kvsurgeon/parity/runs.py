"""Both models opened and asked: at which level of optimisation, within which bounds, and to be measured how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvsurgeon.errors import KvsurgeonError, MissingKernelError, RunError, UsageError
from kvsurgeon.parity.reference_model import Original, examine
from kvsurgeon.parity.report import Report
from kvsurgeon.parity.scenarios import TextLengths
from kvsurgeon.parity.tolerance import TOLERANCES, Arithmetic
from kvsurgeon.runtime import (
    CachedDecoder,
    Given,
    Inputs,
    Optimisation,
    Session,
    UncachedDecoder,
    cache_entries,
    cache_mismatch,
    find_cache,
    inputs_of,
    is_past,
    read_cache_metadata,
)

_LEVELS: tuple[Optimisation, ...] = ("all", "basic", "off")  # each rewrites less than the one before


@dataclass(frozen=True, kw_only=True)
class Hearing:
    """Both models opened, and the original asked on its own; no original where nothing can be judged."""

    report: Report
    original: Original | None = None
    cached: CachedDecoder | None = None


def hear(
    report: Report,
    open_original: Callable[[], Session],
    open_injected: Callable[[], Session],
    *,
    lengths: TextLengths,
    seed: int,
) -> Hearing:
    """Open both, and ask the original on its own.

    Args:
        report: What is known so far.
        open_original: Opens the one.
        open_injected: Opens the other.
        lengths: How long texts should be.
        seed: Where they come from.
    """
    try:
        witness = open_original()
    except MissingKernelError as error:
        return Hearing(report=replace(report, unknown=str(error)))
    try:
        cached = _cached(open_injected(), witness)
    except KvsurgeonError as error:
        return Hearing(report=replace(report, faults=(str(error),)))
    report = replace(_measured(report, cached), faults=_faults(cached, witness))
    if cached.room is not None and cached.room < lengths.long:
        report = replace(
            report, notes=(*report.notes, f"texts of up to {cached.room} tokens were judged: it takes no more")
        )
    try:
        decoder = UncachedDecoder(witness, _inputs(witness, cached))
        known = examine(decoder, _within(lengths, cached.room), report.tolerance.error, seed)
    except RunError as error:
        return Hearing(report=replace(report, unknown=str(error)))
    return Hearing(report=report, original=known, cached=cached)


def steady(ask: Callable[[Optimisation], Hearing], optimisation: Optimisation) -> Hearing:
    """Return a hearing at the highest level of optimisation at which the original agrees with itself.

    onnxruntime may rewrite a graph so that what it says of a token depends on those that follow. Where the original
    does not agree with itself at any level it is the original's own doing, and heard as was asked for.
    """
    first = ask(optimisation)
    if first.original is None or first.original.steady:
        return first
    for level in _LEVELS[_LEVELS.index(optimisation) + 1 :]:
        hearing = ask(level)
        if hearing.original is not None and hearing.original.steady:
            note = (
                f"onnxruntime's graph optimisation `{optimisation}` makes the original give other logits for the same "
                f"tokens when others follow: both models were judged at `{level}`, and should be run so"
            )
            return replace(hearing, report=replace(hearing.report, notes=(note, *hearing.report.notes)))
    return first


def _cached(defendant: Session, witness: Session) -> CachedDecoder:
    """Return the model with a cache: its pasts and presents are what the original lacks.

    Raises:
        UsageError: It has no cache, or pasts and presents do not pair.
    """
    inputs = {tensor.name for tensor in witness.inputs}
    outputs = {tensor.name for tensor in witness.outputs}
    pasts = [tensor for tensor in defendant.inputs if tensor.name not in inputs and is_past(tensor)]
    presents = [tensor for tensor in defendant.outputs if tensor.name not in outputs]
    if len(presents) < len(pasts):  # the original gave them out for the tokens of a call, under the same names
        named = {entry.present for entry in find_cache(pasts, defendant.outputs)}
        presents = [tensor for tensor in defendant.outputs if tensor.name in named]
    if not pasts:
        raise UsageError("expected past inputs that the original lacks, found none: the model has no cache")
    return CachedDecoder(defendant, cache_entries(pasts, presents, read_cache_metadata(defendant.metadata).layouts))


def _within(lengths: TextLengths, room: int | None) -> TextLengths:
    """Return lengths that the cache has room for."""
    if room is None:
        return lengths
    return replace(lengths, short=max(1, min(lengths.short, room)), long=max(1, min(lengths.long, room)))


def _measured(report: Report, cached: CachedDecoder) -> Report:
    """Return the report with the tolerance of a cache that is kept in fewer bits than the model computes in."""
    kept = {str(entry.past.dtype) for entry in cached.cache}
    coarse: tuple[Arithmetic, ...] = ("bfloat16", "float16")
    found = next((arithmetic for arithmetic in coarse if arithmetic in kept), None)
    if found is None or report.arithmetic not in ("float64", "float32"):
        return report
    return replace(report, arithmetic=found, tolerance=TOLERANCES[found])


def _faults(cached: CachedDecoder, witness: Session) -> tuple[str, ...]:
    faults = [cache_mismatch(cached.cache)]
    have = {tensor.name: tensor for tensor in cached.outputs}
    kept = {entry.present for entry in cached.cache}
    for tensor in witness.outputs:
        if tensor.name in kept:
            continue
        if tensor.name not in have:
            faults.append(f"the original's output `{tensor.name}` is missing")
        elif tensor.dtype != have[tensor.name].dtype:
            faults.append(f"the output `{tensor.name}` is {have[tensor.name].dtype}, in the original {tensor.dtype}")
    return tuple(fault for fault in faults if fault is not None)


def _inputs(witness: Session, cached: CachedDecoder) -> Inputs:
    """Return what the original is given: its own inputs, with the meaning that the other model's dims tell.

    A pass may have made of an input another one of the same name: then its own dims tell.
    """
    known = {given.name: given for given in cached.inputs.given}
    return Inputs(given=tuple(_meant(own, known.get(own.name)) for own in inputs_of(witness.inputs).given))


def _meant(own: Given, other: Given | None) -> Given:
    if other is None or len(other.axes) != len(own.axes) or other.tensor.floating != own.tensor.floating:
        return own
    return replace(other, tensor=replace(other.tensor, dtype=own.tensor.dtype))
