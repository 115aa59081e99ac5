"""Whether a model with a cache computes what the original computes.

The judge does not know the defendant: it looks at two files and at what onnxruntime makes of them. What the axes of
inputs stand for it reads from the dims that the model with a cache declares.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx

from kvsurgeon.errors import KvsurgeonError, MissingKernelError, RunError, UsageError
from kvsurgeon.parity.original import Original, examine
from kvsurgeon.parity.report import Report, Trial
from kvsurgeon.parity.scenario import Lengths, Scenario, plan
from kvsurgeon.parity.tolerance import ROUNDED, TOLERANCES, Arithmetic, arithmetic_of, load_graph
from kvsurgeon.parity.trace import Graph, first_difference, telling
from kvsurgeon.parity.trial import judge
from kvsurgeon.parity.unrounded import unrounded
from kvsurgeon.runtime import (
    CachedDecoder,
    Given,
    Inputs,
    Optimisation,
    Session,
    Source,
    UncachedDecoder,
    cache_entries,
    cache_mismatch,
    find_cache,
    fixed_size,
    inputs_of,
    is_past,
    model_file,
    open_session,
    read_note,
)

Progress = Callable[[int, int, str], None]  # trials done, trials in all, name of the next
_UNFUSED: Optimisation = "basic"  # more would round again: `MatMulNBits` of 8-bit weights rounds activations
_ROUNDINGS = 3  # a call's own ranges, its past's, and those of the whole text
_LEVELS: tuple[Optimisation, ...] = ("all", "basic", "off")  # each rewrites less than the one before


def verify(
    original: Source,
    injected: Source,
    *,
    seed: int = 0,
    lengths: Lengths | None = None,
    folder: str | Path | None = None,
    threads: int | None = None,
    optimisation: Optimisation = "all",
    explain: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Run both models on the same random texts, whole and in chunks, and report whether they agree.

    Args:
        original: The model without a cache.
        injected: The same model with one.
        seed: Where the texts come from.
        lengths: How long they are; a static or bounded original may make them shorter.
        folder: Where the external data of models in memory lies.
        threads: Threads that onnxruntime may use for one operator.
        optimisation: How far onnxruntime may rewrite both graphs; less, with a note, where that makes the original
            disagree with itself.
        explain: Whether to look for the first value that differs where they do not agree.
        progress: Told before each trial.

    Returns:
        What was tried and found. A mismatch is reported, never raised.

    Raises:
        InputError: The original cannot be read.
    """
    start = time.perf_counter()
    trial = partial(
        _tried, seed=seed, lengths=lengths or Lengths(), threads=threads, explain=explain, progress=progress
    )
    graphs = load_graph(original), load_graph(injected)
    sides = [_Side(source=source, graph=graph, folder=_folder(source, folder))
             for source, graph in zip((original, injected), graphs, strict=True)]  # fmt: skip
    report, wobble = trial(*sides, optimisation=optimisation)
    if report.arithmetic in ROUNDED:
        exact = [side for side in map(_Side.unrounded, sides) if side is not None]
        if len(exact) == len(sides):
            report = _weighed(report, wobble, trial(*exact, optimisation=_UNFUSED)[0])
    return replace(report, seconds=time.perf_counter() - start)


def _weighed(report: Report, wobble: float, exact: Report) -> Report:
    """Return what is to be said of two models that round: the same apart from that, and fit to run as they are?

    Args:
        report: Of the models as they are.
        wobble: How far the original, as it is, is from itself where other tokens follow.
        exact: Of the models with nothing rounded.
    """
    if exact.verdict == "unknown" or report.verdict == "unknown":
        return report
    exact = replace(exact, arithmetic=report.arithmetic)
    if exact.verdict == "different":
        return replace(exact, notes=(*exact.notes, "judged with nothing rounded to 8 bits"))
    failed = report.faults or any(trial.verdict == "different" and trial.error is None for trial in report.trials)
    allowed = max(report.tolerance.error, _ROUNDINGS * wobble)
    if failed or report.error is None or not report.error <= allowed:
        return report
    said = f"judged with nothing rounded to 8 bits; rounding sets logits apart by {report.error:.2g} of their spread"
    if wobble > report.tolerance.error:
        said += f", and the original's own by {wobble:.2g} where other tokens follow"
    return replace(exact, notes=(*exact.notes, said))


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One of the two models."""

    source: Source
    graph: onnx.ModelProto  # without external weights
    folder: Path | None  # where these lie

    def unrounded(self) -> _Side | None:
        """The model with nothing rounded to 8 bits, where that can be had."""
        graph = unrounded(self.graph)
        return None if graph is None else replace(self, source=graph, graph=graph)


def _tried(
    original: _Side, injected: _Side, *, seed: int, lengths: Lengths, threads: int | None, optimisation: Optimisation,
    explain: bool, progress: Progress | None,
) -> tuple[Report, float]:  # fmt: skip
    """Return what comes of running both, and how far the original is from itself where other tokens follow."""
    arithmetic = arithmetic_of(original.graph)
    blank = Report(arithmetic=arithmetic, tolerance=TOLERANCES[arithmetic])

    def hear(level: Optimisation) -> _Hearing:
        models = [
            partial(open_session, side.source, folder=side.folder, threads=threads, optimisation=level, name=name)
            for side, name in ((original, "the original"), (injected, "the model with a cache"))
        ]
        return _hear(blank, *models, lengths=lengths, seed=seed)

    hearing = _steady(hear, optimisation)
    known, cached, report = hearing.original, hearing.cached, hearing.report
    if known is None or cached is None:
        return report, 0.0
    scenarios = _plan(known, cached, seed)
    trials = _try(scenarios, known, cached, report, progress)
    report = replace(report, trials=trials, notes=report.notes + known.notes + _unjudged(trials))
    scenario = telling(scenarios, trials)
    if explain and scenario is not None:
        before, after = (Graph(model=side.graph, folder=side.folder) for side in (original, injected))
        name = first_difference(
            before,
            after,
            scenario,
            original=known,
            cache=cached.cache,
            allowed=report.tolerance.error,
            threads=threads,
        )
        report = replace(report, first_difference=name)
    return report, known.wobble


@dataclass(frozen=True, kw_only=True)
class _Hearing:
    """Both models opened, and the original asked on its own; no original where nothing can be judged."""

    report: Report
    original: Original | None = None
    cached: CachedDecoder | None = None


def _hear(
    report: Report,
    open_original: Callable[[], Session],
    open_injected: Callable[[], Session],
    *,
    lengths: Lengths,
    seed: int,
) -> _Hearing:
    try:
        witness = open_original()
    except MissingKernelError as error:
        return _Hearing(report=replace(report, unknown=str(error)))
    try:
        cached = _cached(open_injected(), witness)
    except KvsurgeonError as error:
        return _Hearing(report=replace(report, faults=(str(error),)))
    report = replace(_measured(report, cached), faults=_faults(cached, witness))
    if cached.room is not None and cached.room < lengths.long:
        report = replace(
            report, notes=(*report.notes, f"texts of up to {cached.room} tokens were judged: it takes no more")
        )
    try:
        decoder = UncachedDecoder(witness, _inputs(witness, cached))
        known = examine(decoder, _within(lengths, cached.room), report.tolerance.error, seed)
    except RunError as error:
        return _Hearing(report=replace(report, unknown=str(error)))
    return _Hearing(report=report, original=known, cached=cached)


def _steady(hear: Callable[[Optimisation], _Hearing], optimisation: Optimisation) -> _Hearing:
    """Return a hearing at the highest level of optimisation at which the original agrees with itself.

    onnxruntime may rewrite a graph so that what it says of a token depends on those that follow. Where the original
    does not agree with itself at any level it is the original's own doing, and heard as was asked for.
    """
    first = hear(optimisation)
    if first.original is None or first.original.steady:
        return first
    for level in _LEVELS[_LEVELS.index(optimisation) + 1 :]:
        hearing = hear(level)
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
    return CachedDecoder(defendant, cache_entries(pasts, presents, read_note(defendant.metadata).layouts))


def _within(lengths: Lengths, room: int | None) -> Lengths:
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


def _plan(known: Original, cached: CachedDecoder, seed: int) -> tuple[Scenario, ...]:
    batch = 1 if known.by_rows else fixed_size(cached.inputs, cached.session.inputs, "batch")
    masked = cached.inputs.masked and known.inputs.masked
    return plan(lengths=known.lengths, batch=batch, masked=masked, vocabulary=known.vocabulary, seed=seed)


def _try(
    scenarios: tuple[Scenario, ...], known: Original, cached: CachedDecoder, report: Report, progress: Progress | None
) -> tuple[Trial, ...]:
    trials = []
    for number, scenario in enumerate(scenarios):
        if progress is not None:
            progress(number, len(scenarios), scenario.name)
        trials.append(judge(scenario, known, cached, report.tolerance))
    return tuple(trials)


def _unjudged(trials: tuple[Trial, ...]) -> tuple[str, ...]:
    return tuple(f"{trial.scenario} was not judged: {trial.reason}" for trial in trials if trial.verdict == "unknown")


def _folder(source: Source, folder: str | Path | None) -> Path | None:
    if isinstance(source, str | Path):
        return model_file(source).parent
    return None if folder is None else Path(folder)
