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

from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.parity.comparison import judge
from kvsurgeon.parity.float_model import unrounded
from kvsurgeon.parity.reference_model import Original
from kvsurgeon.parity.report import Report, Trial
from kvsurgeon.parity.runs import Hearing, hear, steady
from kvsurgeon.parity.scenarios import Scenario, TextLengths, plan
from kvsurgeon.parity.tolerance import ROUNDED, TOLERANCES, Arithmetic, Tolerance, arithmetic_of, load_graph
from kvsurgeon.parity.trace import Graph, first_difference, telling
from kvsurgeon.runtime import CachedDecoder, Optimisation, Source, fixed_size, folder_of, open_session

Progress = Callable[[int, int, str], None]  # trials done, trials in all, name of the next
_UNFUSED: Optimisation = "basic"  # more would round again: `MatMulNBits` of 8-bit weights rounds activations
_ROUNDINGS = 3  # a call's own ranges, its past's, and those of the whole text
_ORDERS = 3  # of sums: in the call, in those before, and in the original
_NEAR = 10  # times the tolerance: for fine arithmetic still well below what a wrong cache makes
_FINE: frozenset[Arithmetic] = frozenset(("float64", "float32"))


def verify(
    original: Source,
    injected: Source,
    *,
    seed: int = 0,
    lengths: TextLengths | None = None,
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
        _tried, seed=seed, lengths=lengths or TextLengths(), threads=threads, explain=explain, progress=progress
    )
    graphs = load_graph(original), load_graph(injected)
    sides = [_Side(source=source, graph=graph, folder=folder_of(source, folder))
             for source, graph in zip((original, injected), graphs, strict=True)]  # fmt: skip
    report, known = trial(*sides, optimisation=optimisation)
    if report.arithmetic in ROUNDED:
        exact = [side for side in map(_Side.unrounded, sides) if side is not None]
        if len(exact) == len(sides):
            wobble = 0.0 if known is None else known.wobble
            report = _weighed(report, wobble, trial(*exact, optimisation=_UNFUSED)[0])
    elif known is not None and _is_near(report):
        moved = _moved(known, sides[0], threads, seed)
        wider = report.tolerance.widened(min(_ORDERS * moved, _NEAR * report.tolerance.error))
        if wider.error > report.tolerance.error:
            said = f"the original's own logits move by {moved:.2g} where onnxruntime adds them up in another order"
            report, _ = trial(*sides, optimisation=optimisation, tolerance=wider)
            report = replace(report, notes=(*report.notes, said))
    return replace(report, seconds=time.perf_counter() - start)


def _is_near(report: Report) -> bool:
    """Whether two models differ by so little that it may be the order in which sums are taken."""
    ran = not report.faults and all(trial.error is not None for trial in report.trials if trial.verdict == "different")
    near = report.error is not None and report.error <= _NEAR * report.tolerance.error
    return report.verdict == "different" and report.arithmetic in _FINE and ran and near


def _moved(known: Original, side: _Side, threads: int | None, seed: int) -> float:
    """How far the original is from itself as it is written, which onnxruntime rewrote; 0 where that cannot be run."""
    try:
        written = open_session(
            side.source, folder=side.folder, threads=threads, optimisation="off", name="the original"
        )
        return known.moved(written, seed)
    except KvsurgeonError:
        return 0.0


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
    original: _Side, injected: _Side, *, seed: int, lengths: TextLengths, threads: int | None,
    optimisation: Optimisation,
    explain: bool, progress: Progress | None, tolerance: Tolerance | None = None,
) -> tuple[Report, Original | None]:  # fmt: skip
    """Return what comes of running both, and the original as it was heard; none where nothing could be judged."""
    arithmetic = arithmetic_of(original.graph)
    blank = Report(arithmetic=arithmetic, tolerance=tolerance or TOLERANCES[arithmetic])

    def ask(level: Optimisation) -> Hearing:
        models = [
            partial(open_session, side.source, folder=side.folder, threads=threads, optimisation=level, name=name)
            for side, name in ((original, "the original"), (injected, "the model with a cache"))
        ]
        return hear(blank, *models, lengths=lengths, seed=seed)

    hearing = steady(ask, optimisation)
    known, cached, report = hearing.original, hearing.cached, hearing.report
    if known is None or cached is None:
        return report, None
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
    return report, known


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
