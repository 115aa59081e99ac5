"""Verification: whether a model with a cache computes what its reference model computes.

The verifier knows the two files and what onnxruntime computes of them. The meaning of inputs follows from the dims that
the candidate model declares.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.parity.comparison import compare
from kvsurgeon.parity.first_difference import first_difference, simplest_difference
from kvsurgeon.parity.model_source import ModelSource
from kvsurgeon.parity.open_models import Opened, open_models, open_stable
from kvsurgeon.parity.reference_model import ReferenceModel
from kvsurgeon.parity.report import Comparison, Progress, Report
from kvsurgeon.parity.scenarios import TextLengths, plan_scenarios
from kvsurgeon.parity.tolerance import ROUNDED, TOLERANCES, Arithmetic, Tolerance, arithmetic_of
from kvsurgeon.runtime import Optimization, Source

_UNFUSED: Optimization = "basic"  # "all" rounds again: `MatMulNBits` of 8-bit weights rounds activations
_ROUNDINGS = 3  # in ranges of the call, of the calls before, and of the whole text
_SUMS = 3  # of different order: in the call, in the calls before, and in the reference
_NEAR = 10  # multiple of the bound, for exact arithmetic still well below the error of a wrong cache
_EXACT: frozenset[Arithmetic] = frozenset(("float64", "float32"))


def verify(
    reference: Source,
    candidate: Source,
    *,
    seed: int = 0,
    lengths: TextLengths | None = None,
    folder: str | Path | None = None,
    threads: int | None = None,
    optimization: Optimization = "all",
    explain: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Run both models on the same random texts, as a whole and in chunks, and compare all outputs and the cache.

    Args:
        reference: The model without a cache.
        candidate: The same model with a cache.
        seed: Random seed of the texts.
        lengths: Sizes of the texts; shorter if a model takes no more.
        folder: Folder of the external data of models in memory.
        threads: Number of threads per operator.
        optimization: Level of onnxruntime's graph optimization; lower, with a note, if the reference is unstable at it.
        explain: Whether to search for the first value that differs.
        progress: Called before each scenario.

    Returns:
        A report; a difference is returned, not raised.

    Raises:
        InputError: A model cannot be read.
    """
    start = time.perf_counter()
    run = partial(_compare_all, seed=seed, lengths=lengths or TextLengths(), explain=explain, progress=progress)
    models = (
        ModelSource.of(reference, "the reference model", folder, threads),
        ModelSource.of(candidate, "the candidate model", folder, threads),
    )
    report, opened = run(models, optimization=optimization)
    if report.arithmetic in ROUNDED:
        in_floats = models[0].in_floats(), models[1].in_floats()
        if in_floats[0] is not None and in_floats[1] is not None:
            exact, _ = run((in_floats[0], in_floats[1]), optimization=_UNFUSED)
            report = _without_rounding(report, 0.0 if opened is None else opened.noise_floor, exact)
    elif opened is not None and _nearly_same(report):
        noise = _summation_noise(opened, models[0], seed)
        tolerance = report.tolerance.widened(min(_SUMS * noise, _NEAR * report.bound))
        if tolerance.bound > report.bound:
            report, _ = run(models, optimization=optimization, tolerance=tolerance)
            note = f"the reference model's logits differ by {noise:.2g} if onnxruntime adds in another order"
            report = replace(report, notes=(*report.notes, note))
    return replace(report, seconds=time.perf_counter() - start)


def _nearly_same(report: Report) -> bool:
    """Whether two models differ by no more than sums in another order may explain."""
    different = [comparison for comparison in report.comparisons if comparison.verdict == "different"]
    ran = not report.faults and all(comparison.error is not None for comparison in different)
    near = report.error is not None and report.error <= _NEAR * report.bound
    return report.verdict == "different" and report.arithmetic in _EXACT and ran and near


def _summation_noise(reference: ReferenceModel, model: ModelSource, seed: int) -> float:
    """Return the error of the reference without graph optimization, which adds in another order; 0 if it fails."""
    try:
        return reference.distance_to(model.open("off"), seed)
    except KvsurgeonError:
        return 0.0


def _without_rounding(report: Report, noise_floor: float, exact: Report) -> Report:
    """Return the report on two models that round activations to 8 bits.

    It is that on the models without rounding, unless the models with rounding fail or differ by more than rounding.

    Args:
        report: Report on the models with rounding.
        noise_floor: Error of the reference with rounding, between its logits with and without later tokens.
        exact: Report on the models without rounding.
    """
    if exact.verdict == "unknown" or report.verdict == "unknown":
        return report
    exact = replace(exact, arithmetic=report.arithmetic)
    if exact.verdict == "different":
        return replace(exact, notes=(*exact.notes, "verified without rounding to 8 bits"))
    failed = report.faults or any(one.verdict == "different" and one.error is None for one in report.comparisons)
    if failed or report.error is None or not report.error <= max(report.bound, _ROUNDINGS * noise_floor):
        return report
    note = f"verified without rounding to 8 bits; with it, logits differ by {report.error:.2g} of their spread"
    if noise_floor > report.bound:
        note += f", and the reference model's own by {noise_floor:.2g} if other tokens follow"
    return replace(exact, notes=(*exact.notes, note))


def _compare_all(
    models: tuple[ModelSource, ModelSource], *, seed: int, lengths: TextLengths,
    optimization: Optimization, explain: bool, progress: Progress | None, tolerance: Tolerance | None = None,
) -> tuple[Report, ReferenceModel | None]:  # fmt: skip
    """Compare both models on all scenarios; return the report and the reference model, if both could be opened."""
    arithmetic = arithmetic_of(models[0].graph)
    blank = Report(arithmetic=arithmetic, tolerance=tolerance or TOLERANCES[arithmetic])

    def open_at(level: Optimization) -> Opened:
        sessions = (partial(model.open, level) for model in models)
        return open_models(blank, *sessions, lengths=lengths, seed=seed)

    report, reference, candidate = open_stable(open_at, optimization)
    if reference is None or candidate is None:
        return report, None
    scenarios = plan_scenarios(
        lengths=reference.lengths,
        batch=1 if reference.single_row else candidate.batch,
        masked=candidate.inputs.masked and reference.inputs.masked,
        vocabulary=reference.vocabulary,
        seed=seed,
    )
    comparisons: list[Comparison] = []
    for number, scenario in enumerate(scenarios):
        if progress is not None:
            progress(number, len(scenarios), scenario.name)
        comparisons.append(compare(scenario, reference, candidate, report.tolerance))
    skipped = (f"{one.scenario} was not compared: {one.reason}" for one in comparisons if one.verdict == "unknown")
    report = replace(report, comparisons=tuple(comparisons), notes=(*report.notes, *reference.notes, *skipped))
    simplest = simplest_difference(scenarios, comparisons)
    if explain and simplest is not None:
        name = first_difference(models, simplest, reference=reference, cache=candidate.cache, bound=report.bound)
        report = replace(report, first_difference=name)
    return report, reference
