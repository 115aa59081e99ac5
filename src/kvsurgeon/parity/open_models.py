"""Sessions for a verification: on both models, at a level of graph optimization at which the reference is stable."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from kvsurgeon.errors import KvsurgeonError, MissingKernelError, RunError, UsageError
from kvsurgeon.parity.arithmetic.tolerance import ROUNDED, TOLERANCES, Arithmetic
from kvsurgeon.parity.reference_model import ReferenceModel, probe_reference
from kvsurgeon.parity.report import Report
from kvsurgeon.parity.scenarios import TextLengths
from kvsurgeon.runtime import AnyDecoder, CachedDecoder, Optimization, Session, ValueInfo
from kvsurgeon.runtime.axes import (
    cache_entries,
    cache_mismatch,
    find_presents,
    is_cross_attention,
    is_past,
    may_be_past,
    present_name,
    tokens_first,
)
from kvsurgeon.runtime.cache_managers import read_cache_metadata, read_first_call
from kvsurgeon.runtime.decoder import UncachedDecoder
from kvsurgeon.runtime.feeds import inputs_of
from kvsurgeon.runtime.shared_inputs import share_inputs

Opened = tuple[Report, ReferenceModel | None, AnyDecoder | None]  # no models: the report says why

_LEVELS: tuple[Optimization, ...] = ("all", "basic", "off")
_FOUR_BITS = (  # 0.95 measured over three layers with random weights, and a wrong cache may give less
    "a cache of 4 bits may move logits by as much as their spread, which hides faults; compare with "
    "the model that remove-cache makes of it, and measure the accuracy loss with --loss"
)
_FEW = 5  # tokens; a model of any length that takes less is not fed what it expects


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
        after = open_candidate()
    except KvsurgeonError as error:
        return replace(report, faults=(str(error),)), None, None
    try:
        reference = _decoder(session, after)
    except UsageError as error:
        return replace(report, unverifiable=f"the reference model has unknown inputs: {error}"), None, None
    try:
        candidate = _decoder(after, session)
    except KvsurgeonError as error:
        return replace(report, faults=(str(error),)), None, None
    blocks = read_first_call(session.metadata) | read_first_call(after.metadata)
    for decoder in (reference, candidate):
        decoder.use_inputs(decoder.inputs.with_blocks(blocks))
    faults, notes = _output_differences(candidate, reference)
    report = replace(_with_cache_tolerance(report, candidate), faults=faults, notes=(*report.notes, *notes))
    if report.unverifiable is not None:
        return report, None, None
    share_inputs([reference, candidate], seed)
    _order_outputs(reference, candidate)
    return _probed(report, reference, candidate, lengths, seed)


def _probed(report: Report, reference: AnyDecoder, candidate: AnyDecoder, lengths: TextLengths, seed: int) -> Opened:
    """Return the models with the sizes of texts that both take."""
    capacities, wanted = [], lengths.long
    for decoder, name in ((reference, "reference"), (candidate, "candidate")):
        capacity = decoder.max_length
        if capacity is not None:
            capacities.append(capacity)
            if capacity < lengths.long:
                note = f"texts have up to {capacity} tokens: the {name} model takes no more"
                report = replace(report, notes=(*report.notes, note))
            short, long = (max(1, min(length, capacity)) for length in (lengths.short, lengths.long))
            lengths = replace(lengths, short=short, long=long)
    length = reference.length or candidate.length
    try:
        model = probe_reference(reference, lengths, length, report.bound, seed)
    except (RunError, UsageError) as error:
        return replace(report, unverifiable=str(error)), None, None
    if length is None and model.lengths.long < min(_FEW, wanted):
        reason = (
            f"the reference model takes texts of up to {model.lengths.long} tokens only, of the inputs that are known"
        )
        return replace(report, unverifiable=reason), None, None
    longest = min((one for one in (model.longest, *capacities) if one is not None), default=None)
    return report, replace(model, longest=longest), candidate


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


def _decoder(session: Session, other: Session) -> AnyDecoder:
    """Return a decoder on a session.

    Its cache is the pasts that names and dims show, the other model's dims for inputs of the same name included, and
    those that the other model lacks.

    Raises:
        UsageError: There is no input of tokens, or pasts do not pair with presents.
    """
    names = {tensor.name for tensor in (*other.inputs, *other.outputs)}
    new_outputs = [one for one in session.outputs if _is_new(one, names)]
    named = [
        one for one in session.outputs if one in new_outputs or ("present" in one.name and not is_cross_attention(one))
    ]
    pasts = [one for one in session.inputs if _is_past(one, other, names, named or session.outputs)]
    if len(pasts) > len(named) > 0:
        pasts = _without_given(pasts, {one.name for one in session.outputs})
    if not pasts:
        return _uncached(session, other)
    candidates = (new_outputs, named, find_presents(pasts, session.outputs))
    presents = next((found for found in candidates if len(found) == len(pasts)), new_outputs or candidates[-1])
    layouts = read_cache_metadata(session.metadata).layouts
    return CachedDecoder(session, cache_entries(pasts, presents, layouts))


def _uncached(session: Session, other: Session) -> UncachedDecoder:
    """Return a decoder without a cache; if its dims show no tokens, by those of the other model.

    Raises:
        UsageError: There is no input of tokens.
    """
    try:
        return UncachedDecoder(session)
    except UsageError:
        shown = inputs_of([_with_dims_of(tensor, other.inputs) for tensor in session.inputs])
        own = {tensor.name: tensor for tensor in session.inputs}  # by whose dims outputs are called
        return UncachedDecoder(
            session, replace(shown, specs=tuple(replace(spec, tensor=own[spec.name]) for spec in shown.specs))
        )


def _is_past(tensor: ValueInfo, other: Session, names: Collection[str], presents: Sequence[ValueInfo]) -> bool:
    if is_past(tensor) or is_past(_with_dims_of(tensor, other.inputs)):
        return True
    return _is_new(tensor, names) and may_be_past(tensor, presents)


def _with_dims_of(past: ValueInfo, others: Sequence[ValueInfo]) -> ValueInfo:
    """Return a past with the dims of the other model's input of the same name, if all its numbers are equal there."""
    for other in others:
        if other.name == past.name and len(other.dims) == len(past.dims):
            pairs = list(zip(past.dims, other.dims, strict=True))
            if all(own == dim for own, dim in pairs if isinstance(own, int)):
                return replace(past, dims=tuple(dim for _, dim in pairs))
    return past


def _is_new(tensor: ValueInfo, names: Collection[str]) -> bool:
    return tensor.name not in names and len(tensor.dims) > 2 and not is_cross_attention(tensor)


def _with_cache_tolerance(report: Report, candidate: AnyDecoder) -> Report:
    """Return the report with the tolerance of the cache's type, if that is coarser than the arithmetic."""
    if report.arithmetic in ROUNDED:
        return report
    types = {str(entry.past.dtype) for entry in candidate.cache}
    if "uint8" in types:
        return replace(report, unverifiable=_FOUR_BITS)
    coarse: dict[str, Arithmetic] = {"int8": "quantized", "bfloat16": "bfloat16", "float16": "float16"}
    found = next((arithmetic for name, arithmetic in coarse.items() if name in types), None)
    finest_first = list(map(str, TOLERANCES))
    if found is None or finest_first.index(found) <= finest_first.index(report.arithmetic):
        return report
    return replace(report, arithmetic=found, tolerance=TOLERANCES[found])


def _output_differences(candidate: AnyDecoder, reference: AnyDecoder) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return faults of the candidate's outputs, and notes about those of another floating-point type."""
    mismatch = cache_mismatch(candidate.cache)
    faults: list[str] = [] if mismatch is None else [mismatch]
    notes: list[str] = []
    have = {tensor.name: tensor for tensor in candidate.outputs}
    presents = {entry.present for entry in candidate.cache}
    for tensor in reference.outputs:
        name = tensor.name
        if name in presents:
            continue
        if name not in have:
            faults.append(f"the candidate model lacks the output `{name}`")
        elif tensor.dtype != have[name].dtype:
            known = notes if tensor.floating and have[name].floating else faults
            known.append(f"output `{name}` is {have[name].dtype}, in the reference model {tensor.dtype}")
    return tuple(faults), tuple(notes)


def _without_given(pasts: Sequence[ValueInfo], returned: Collection[str]) -> list[ValueInfo]:
    """Return the pasts without what is given, such as keys of an encoder: no output, and a separate length."""
    updated = [one for one in pasts if present_name(one) in returned]
    dims = {dim for one in updated for dim in one.dims}
    return [one for one in pasts if one in updated or not updated or dims.issuperset(one.dims)]


def _order_outputs(reference: AnyDecoder, candidate: AnyDecoder) -> None:
    """Move batch and tokens to the front of each output in which both models have them at the same axes."""
    first, second = _orders(reference), _orders(candidate)
    orders = {name: order for name, order in first.items() if second.get(name) == order}
    reference.use_orders(orders)
    candidate.use_orders(orders)


def _orders(decoder: AnyDecoder) -> dict[str, tuple[int, ...]]:
    tokens = decoder.inputs.tokens
    dims = dict(zip(tokens.axes, tokens.tensor.dims, strict=True))
    return {one.name: tokens_first(one, dims.get("batch"), dims.get("sequence")) for one in decoder.outputs}
