"""Verification: whether a candidate model computes what its reference model computes.

The verifier knows the two files and what onnxruntime computes of them. The meaning of inputs follows from the dims that
the models declare.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from kvsurgeon.parity.arithmetic.rounding import ReferenceNoise
from kvsurgeon.parity.arithmetic.tolerance import (
    ROUNDED,
    ROUNDINGS,
    TOLERANCES,
    Arithmetic,
    arithmetic_of,
    float_type_of,
)
from kvsurgeon.parity.comparison import SUMS, compare, compare_ragged, ragged_scenario, without_unstable_tokens
from kvsurgeon.parity.first_difference import first_difference, simplest_difference
from kvsurgeon.parity.model_source import ModelSource
from kvsurgeon.parity.open_models import Opened, open_models, open_stable
from kvsurgeon.parity.reference_model import ReferenceModel
from kvsurgeon.parity.report import Comparison, Progress, Report
from kvsurgeon.parity.scenarios import Effort, Plan, Scenario, TextLengths, plan_scenarios
from kvsurgeon.parity.thresholds import reached, thresholds_in
from kvsurgeon.runtime import AnyDecoder, CachedDecoder, Optimization, Source
from kvsurgeon.runtime.providers import CPU

_UNFUSED: Optimization = "basic"  # "all" rounds again: `MatMulNBits` of 8-bit weights rounds activations
_16_BITS: frozenset[Arithmetic] = frozenset(("float16", "bfloat16"))
_EXACT: frozenset[Arithmetic] = frozenset(("float64", "float32"))
_MEASURED = _EXACT | {"float16"}  # onnxruntime has few kernels for bfloat16, and rounding to 8 bits is no noise
_NEAR = 10  # multiple of the bound, for exact arithmetic, still well below the error of a wrong cache
_AGREEING = 0.5  # of the tokens of a text, whose most likely next one rounding leaves as it is
_TIGHT = 20  # the bound of a model without noise is so many times smaller


def verify(
    reference: Source,
    candidate: Source,
    *,
    seed: int | None = None,
    effort: Effort = "normal",
    thresholds: Collection[int] = (),
    lengths: TextLengths | None = None,
    folder: str | Path | None = None,
    threads: int | None = None,
    provider: str = CPU,
    optimization: Optimization = "all",
    explain: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Run both models on the same random texts, as a whole and in chunks, and compare all outputs and the cache.

    Args:
        reference: The model before a change.
        candidate: The model after it, with a cache or without.
        seed: Random seed of the texts; None draws one, which the report names.
        effort: How many texts, and of which lengths.
        thresholds: Lengths after which a model may compute something else, such as sliding windows; the verifier finds
            those that a graph compares a number with.
        lengths: Sizes of the texts; shorter if a model takes no more. None for those of the effort.
        folder: Folder of the external data of models in memory.
        threads: Number of threads per operator.
        provider: Execution provider of the candidate; the reference model runs on the CPU.
        optimization: Level of onnxruntime's graph optimization; lower, with a note, if the reference is unstable at it.
        explain: Whether to search for the first value that differs.
        progress: Called before each scenario.

    Returns:
        A report; a difference is returned, not raised.

    Raises:
        InputError: A model cannot be read.
    """
    start = time.perf_counter()
    seed = secrets.randbelow(2**31) if seed is None else seed
    models = (
        ModelSource.of(reference, "the reference model", folder, threads),
        ModelSource.of(candidate, "the candidate model", folder, threads, provider),
    )
    work = _Verification(
        seed=seed, effort=effort, thresholds=frozenset(thresholds), lengths=lengths, explain=explain, progress=progress
    )
    report = work.compare(models, optimization)
    if float_type_of(models[0].graph) in _16_BITS and report.verdict != "same":
        report = work.in_float32(models, report, optimization)
    return replace(report, seed=seed, effort=effort, seconds=time.perf_counter() - start)


@dataclass(frozen=True, kw_only=True)
class _Verification:
    """The options of a verification; see `verify`."""

    seed: int
    effort: Effort
    thresholds: frozenset[int]
    lengths: TextLengths | None
    explain: bool
    progress: Progress | None

    def compare(self, models: tuple[ModelSource, ModelSource], optimization: Optimization) -> Report:
        """Return the report on two models, without rounding of activations to 8 bits if they round."""
        if arithmetic_of(models[0].graph) in ROUNDED:
            return self.without_rounding(models, optimization)
        return self.compare_all(models, optimization)[0]

    def in_float32(self, models: tuple[ModelSource, ModelSource], report: Report, optimization: Optimization) -> Report:
        """Return the report on two models in 16 bits that are not the same in them, computed in float32.

        It is the given one if they fail in 16 bits, or if most tokens differ there.
        """
        error, agreement = report.error, report.agreement
        if report.verdict == "different" and (
            report.faults or error is None or not np.isfinite(error) or (agreement or 0.0) < _AGREEING
        ):
            return report
        wide = models[0].in_float32(), models[1].in_float32()
        if wide[0] is None or wide[1] is None:
            return report
        exact = self.compare((wide[0], wide[1]), optimization)
        if exact.verdict == "unknown":
            return report
        reason = report.unverifiable if error is None else f"outputs differ by {error:.2g} of their spread"
        note = f"verified in float32; in {float_type_of(models[0].graph)}: {reason}"
        return replace(exact, arithmetic=report.arithmetic, notes=(*exact.notes, note))

    def without_rounding(self, models: tuple[ModelSource, ModelSource], optimization: Optimization) -> Report:
        """Return the report on two models that round activations to 8 bits, without this rounding.

        The models with rounding run on a few texts only: their outputs depend on the tokens that share a call.
        """
        in_floats = models[0].in_floats(), models[1].in_floats()
        if in_floats[0] is None or in_floats[1] is None:
            return self.compare_all(models, optimization)[0]
        exact, _ = self.compare_all((in_floats[0], in_floats[1]), _UNFUSED)
        if exact.verdict == "unknown":
            return self.compare_all(models, optimization)[0]
        del in_floats
        exact = replace(exact, arithmetic=arithmetic_of(models[0].graph))
        if exact.verdict == "different":
            return replace(exact, notes=(*exact.notes, "verified without rounding to 8 bits"))
        rounded, reference = replace(self, effort="quick", explain=False).compare_all(models, optimization)
        noise = 0.0 if reference is None else reference.noise
        different = (one.error for one in rounded.comparisons if one.verdict == "different")
        if rounded.faults or any(error is None or not np.isfinite(error) for error in different):
            return rounded
        note = "verified without rounding to 8 bits; with it"
        if rounded.verdict == "unknown":
            return replace(exact, notes=(*exact.notes, f"{note}: {rounded.unverifiable}"))
        error = rounded.error or 0.0
        note += f", logits differ by {error:.2g} of their spread"
        if not error <= max(rounded.bound, ROUNDINGS * noise):
            note += ", which is more than usual: measure the loss of accuracy"
        if noise > rounded.bound:
            note += f", and the reference model's own by {noise:.2g} if other tokens follow"
        return replace(exact, notes=(*exact.notes, note))

    def compare_all(
        self, models: tuple[ModelSource, ModelSource], optimization: Optimization
    ) -> tuple[Report, ReferenceModel | None]:
        """Compare both models on all scenarios; return the report and the reference model, if both could be opened."""
        arithmetic = arithmetic_of(models[0].graph)
        blank = Report(arithmetic=arithmetic, tolerance=TOLERANCES[arithmetic])
        lengths = self.lengths or TextLengths.of(self.effort)

        def open_at(level: Optimization) -> Opened:
            sessions = (partial(model.open, level) for model in models)
            return open_models(blank, *sessions, lengths=lengths, seed=self.seed)

        report, reference, candidate = open_stable(open_at, optimization)
        if reference is None or candidate is None:
            return report, None
        noise = ReferenceNoise(reference, models[0], optimization, self.seed)
        exact = report.arithmetic in _EXACT
        widest = _NEAR * report.bound if exact else report.bound
        measurable, rounding = report.arithmetic in _MEASURED and not report.faults, 0.0
        if report.arithmetic in _MEASURED:
            bound = max(report.bound / _TIGHT, min(SUMS * reference.noise, report.bound))
            report = replace(report, tolerance=report.tolerance.with_bound(bound))
        scenarios = self.plan(models, reference, candidate)
        ragged = ragged_scenario(reference, candidate, np.random.default_rng(self.seed))
        count = len(scenarios) + (ragged is not None)
        comparisons: list[Comparison] = []
        for number, scenario in enumerate(scenarios):
            self.report_progress(number, count, scenario)
            found = compare(scenario, noise, candidate, report.tolerance)
            near = found.verdict == "different" and found.error is not None and found.error <= widest
            if near and measurable:
                output = found.output or reference.main
                on_text = noise.on(scenario, output) if exact else 0.0  # the bound of others is wide
                rounding = max(rounding, noise.largest, on_text)
                bound = max(report.bound, min(SUMS * rounding, widest))
                report = replace(report, tolerance=report.tolerance.with_bound(bound))
                found = compare(scenario, noise, candidate, report.tolerance)
            if exact:
                found = without_unstable_tokens(found, scenario, noise, candidate, report.tolerance)
            comparisons.append(found)
        if rounding:
            note = f"the reference model's logits differ by {rounding:.2g} if onnxruntime adds in another order"
            report = replace(report, notes=(*report.notes, f"{note} or rounds again"))
        notes = (*report.notes, *reference.notes, *_not_compared(comparisons))
        report = replace(report, comparisons=tuple(comparisons), notes=notes)
        name = self.first_difference(models, reference, candidate, scenarios, report)
        report = replace(report, first_difference=name)
        if ragged is not None and isinstance(candidate, CachedDecoder):
            self.report_progress(len(scenarios), count, ragged)
            found = compare_ragged(ragged, reference, candidate, report.bound)
            report = replace(report, comparisons=(*report.comparisons, found))
        if arithmetic == "dynamic" and report.verdict == "different" and reference.noise > report.bound:
            reason = (
                f"ranges of a call alone move the reference model's logits by {reference.noise:.2g} of their spread"
            )
            report = replace(report, comparisons=(), unverifiable=f"{reason}, more than {report.bound:g}")
        return report, reference

    def report_progress(self, number: int, count: int, scenario: Scenario) -> None:
        """Tell the caller which scenario comes next, and of how many."""
        if self.progress is not None:
            self.progress(number, count, scenario.name)

    def first_difference(
        self,
        models: tuple[ModelSource, ModelSource],
        reference: ReferenceModel,
        candidate: AnyDecoder,
        scenarios: Sequence[Scenario],
        report: Report,
    ) -> str | None:
        """Return the first value that differs on the simplest text, if it is searched for and found."""
        simplest = simplest_difference(scenarios, report.comparisons)
        if not self.explain or simplest is None or not candidate.cache:
            return None
        return first_difference(models, simplest, reference=reference, cache=candidate.cache, bound=report.bound)

    def plan(
        self, models: tuple[ModelSource, ModelSource], reference: ReferenceModel, candidate: AnyDecoder
    ) -> tuple[Scenario, ...]:
        """Return the scenarios for two models."""
        fixed = candidate.batch
        if fixed is None and reference.decoder.cache:
            fixed = reference.decoder.batch
        plan = Plan(
            lengths=reference.lengths,
            batch=1 if reference.single_row else fixed,
            masked=candidate.takes_padding and reference.decoder.takes_padding,
            in_calls=bool(candidate.cache),
            vocabulary=reference.vocabulary,
            random=np.random.default_rng(self.seed),
        )
        named = self.thresholds.union(*(thresholds_in(model.graph) for model in models))
        return plan_scenarios(plan, self.effort, reached(named, reference, self.effort, models[1].graph))


def _not_compared(comparisons: Collection[Comparison]) -> Iterator[str]:
    """Yield notes on the texts and the tokens that were not compared."""
    for one in comparisons:
        if one.verdict == "unknown":
            yield f"{one.scenario} was not compared: {one.reason}"
    count = sum(one.left_out for one in comparisons)
    if count:
        yield f"{count} tokens were left out: rounding alone moves their logits in the reference model further"
