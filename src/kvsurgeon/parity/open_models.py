"""Sessions for a verification: on both models, at a level of graph optimization at which the reference is stable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kvsurgeon.errors import KvsurgeonError, MissingKernelError, RunError, UsageError
from kvsurgeon.parity.reference_model import ReferenceModel, probe_reference
from kvsurgeon.parity.report import Report
from kvsurgeon.parity.scenarios import TextLengths
from kvsurgeon.parity.tolerance import TOLERANCES, Arithmetic
from kvsurgeon.runtime import CachedDecoder, DecoderInputs, InputSpec, Optimization, Session, UncachedDecoder
from kvsurgeon.runtime.axes import cache_entries, cache_mismatch, find_cache, is_past
from kvsurgeon.runtime.cache_managers import read_cache_metadata
from kvsurgeon.runtime.feeds import inputs_of

Opened = tuple[Report, ReferenceModel | None, CachedDecoder | None]  # no models: the report says why

_LEVELS: tuple[Optimization, ...] = ("all", "basic", "off")


def open_models(
    report: Report,
    open_reference: Callable[[], Session],
    open_candidate: Callable[[], Session],
    *,
    lengths: TextLengths,
    seed: int,
) -> Opened:
    """Open both models, and probe the reference.

    Args:
        report: A report without comparisons.
        open_reference: Opens the reference model.
        open_candidate: Opens the candidate model.
        lengths: Sizes of the texts.
        seed: Random seed.
    """
    try:
        session = open_reference()
    except MissingKernelError as error:
        return replace(report, unverifiable=str(error)), None, None
    try:
        candidate = _candidate_decoder(open_candidate(), session)
    except KvsurgeonError as error:
        return replace(report, faults=(str(error),)), None, None
    report = replace(_with_cache_tolerance(report, candidate), faults=_output_faults(candidate, session))
    capacity = candidate.max_length
    if capacity is not None:
        if capacity < lengths.long:
            note = f"texts have up to {capacity} tokens: the candidate model takes no more"
            report = replace(report, notes=(*report.notes, note))
        short, long = (max(1, min(length, capacity)) for length in (lengths.short, lengths.long))
        lengths = replace(lengths, short=short, long=long)
    try:
        decoder = UncachedDecoder(session, _reference_inputs(session, candidate))
        return report, probe_reference(decoder, lengths, report.bound, seed), candidate
    except RunError as error:
        return replace(report, unverifiable=str(error)), None, None


def open_stable(open_at: Callable[[Optimization], Opened], optimization: Optimization) -> Opened:
    """Return the models opened at the highest level of graph optimization at which the reference is prefix-stable.

    onnxruntime may rewrite a graph so that the logits of a token depend on later tokens. A reference that is unstable
    at each level is opened at the requested one.
    """
    first = open_at(optimization)
    if first[1] is None or first[1].prefix_stable:
        return first
    for level in _LEVELS[_LEVELS.index(optimization) + 1 :]:
        report, reference, candidate = open_at(level)
        if reference is not None and reference.prefix_stable:
            note = (
                f"at onnxruntime's graph optimization `{optimization}`, the reference model's logits depend on later "
                f"tokens: both models are verified at `{level}`, and should be run at it"
            )
            return replace(report, notes=(note, *report.notes)), reference, candidate
    return first


def _candidate_decoder(session: Session, reference: Session) -> CachedDecoder:
    """Return the candidate as a decoder: its cache is the pasts and presents that the reference lacks.

    Raises:
        UsageError: There are no such pasts, or they do not pair with presents.
    """
    inputs = {tensor.name for tensor in reference.inputs}
    outputs = {tensor.name for tensor in reference.outputs}
    pasts = [tensor for tensor in session.inputs if tensor.name not in inputs and is_past(tensor)]
    presents = [tensor for tensor in session.outputs if tensor.name not in outputs]
    if len(presents) < len(pasts):  # the reference has presents too, for the tokens of a call
        named = {entry.present for entry in find_cache(pasts, session.outputs)}
        presents = [tensor for tensor in session.outputs if tensor.name in named]
    if not pasts:
        raise UsageError("expected past inputs that the reference model lacks, found none: the candidate has no cache")
    return CachedDecoder(session, cache_entries(pasts, presents, read_cache_metadata(session.metadata).layouts))


def _with_cache_tolerance(report: Report, candidate: CachedDecoder) -> Report:
    """Return the report with the tolerance of the cache's type, if that is coarser than the arithmetic."""
    types = {str(entry.past.dtype) for entry in candidate.cache}
    coarse: tuple[Arithmetic, ...] = ("bfloat16", "float16")
    found = next((arithmetic for arithmetic in coarse if arithmetic in types), None)
    if found is None or report.arithmetic not in ("float64", "float32"):
        return report
    return replace(report, arithmetic=found, tolerance=TOLERANCES[found])


def _output_faults(candidate: CachedDecoder, reference: Session) -> tuple[str, ...]:
    faults = [cache_mismatch(candidate.cache)]
    have = {tensor.name: tensor.dtype for tensor in candidate.outputs}
    presents = {entry.present for entry in candidate.cache}
    for tensor in reference.outputs:
        name = tensor.name
        if name in presents:
            continue
        if name not in have:
            faults.append(f"the candidate model lacks the output `{name}`")
        elif tensor.dtype != have[name]:
            faults.append(f"output `{name}` is {have[name]}, in the reference model {tensor.dtype}")
    return tuple(fault for fault in faults if fault is not None)


def _reference_inputs(reference: Session, candidate: CachedDecoder) -> DecoderInputs:
    """Return the inputs of the reference, with the kinds and axes of the candidate's inputs of the same name."""
    known = {spec.name: spec for spec in candidate.inputs.specs}
    return DecoderInputs(specs=tuple(_merged(spec, known.get(spec.name)) for spec in inputs_of(reference.inputs).specs))


def _merged(own: InputSpec, other: InputSpec | None) -> InputSpec:
    """Return the candidate's input with the reference's type; the reference's if a pass made another kind of input."""
    if other is None or len(other.axes) != len(own.axes) or other.tensor.floating != own.tensor.floating:
        return own
    return replace(other, tensor=replace(other.tensor, dtype=own.tensor.dtype))
