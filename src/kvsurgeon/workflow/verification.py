"""Verification of a model after any passes: whether it computes what its reference model computes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from kvsurgeon.errors import KvsurgeonError, MissingKernelError, RunError, UsageError
from kvsurgeon.io.json_files import parse_json
from kvsurgeon.parity import TOLERANCES, Comparison, Progress, Report, Scenario, arithmetic_of, load_graph, verify
from kvsurgeon.parity.difference import distance, spread
from kvsurgeon.runtime import AnyDecoder, Array, CachedDecoder, Source, Tokens, UncachedDecoder, ValueInfo
from kvsurgeon.runtime.axes import cache_entries, find_presents, is_past, may_be_past, token_axes
from kvsurgeon.runtime.cache_managers import read_cache_metadata
from kvsurgeon.runtime.feeds import fixed_size
from kvsurgeon.runtime.session import Session, open_session
from kvsurgeon.runtime.tensors import from_proto

CONTEXT = "kvsurgeon.context"  # metadata key: how an application computes masks and position tables
LENGTHS = (7, 13)  # tokens of the texts, for models of any length
PADDING = 3  # tokens of left padding in every second row of the last text
VOCABULARY = 16  # token IDs that any model knows
UNSTABLE = "the reference model's outputs differ between one call and several"

Outputs = dict[str, Array]


def verify_models(
    reference: Source, candidate: Source, *, folder: Path | None = None, seed: int = 0, progress: Progress | None = None
) -> Report:
    """Run both models on the same texts, and compare all outputs but the cache.

    A candidate that gains a cache is verified by `kvsurgeon.parity`. Otherwise both models run alike: in several calls
    if both have a cache.

    Args:
        reference: The model before the passes.
        candidate: The model after them.
        folder: Folder of the external data of models in memory.
        seed: Random seed of the texts.
        progress: Called before each scenario of a candidate that gains a cache.
    """
    models = load_graph(reference), load_graph(candidate)
    arithmetic = arithmetic_of(models[0])
    report = Report(arithmetic=arithmetic, tolerance=TOLERANCES[arithmetic])
    computed = _computed_inputs(models[1]) - _computed_inputs(models[0])
    if computed:
        reason = f"the application computes `{min(computed)}` (metadata `{CONTEXT}`), and the verifier does not"
        return replace(report, unverifiable=reason)
    if _gains_cache(models[0].graph, models[1].graph):
        return verify(reference, candidate, folder=folder, seed=seed, progress=progress)
    try:
        before = open_session(reference, folder=folder, name="the reference model")
    except MissingKernelError as error:
        return replace(report, unverifiable=str(error))
    try:
        after = open_session(candidate, folder=folder, name="the candidate model")
        return _compared(report, before, after, seed)
    except KvsurgeonError as error:
        return replace(report, faults=(str(error),))


def _gains_cache(before: onnx.GraphProto, after: onnx.GraphProto) -> bool:
    """Whether the candidate has a cache that the reference lacks; the reference may have outputs named as presents."""
    outputs, more_outputs = ({value.name for value in graph.output} for graph in (before, after))
    pasts = {value.name for value in after.input if is_past(from_proto(value))} - {value.name for value in before.input}
    return outputs <= more_outputs and bool(more_outputs - outputs or pasts)


def _computed_inputs(model: onnx.ModelProto) -> set[str]:
    """Return the inputs that an application computes by the metadata, other than masks and position numbers."""
    metadata = next((entry.value for entry in model.metadata_props if entry.key == CONTEXT), "{}")
    try:
        inputs = parse_json(metadata).get("inputs", {}).items()
        return {name for name, how in inputs if how.get("seen") != 0 and not _is_range(how.get("table"))}
    except (ValueError, AttributeError):  # another tool's metadata
        return set()


def _is_range(table: object) -> bool:
    return isinstance(table, list) and table == [*range(len(table))]


def _compared(report: Report, before: Session, after: Session, seed: int) -> Report:
    """Return the report with a comparison of both models for each text.

    Raises:
        KvsurgeonError: The candidate model fails.
    """
    try:
        reference = _decoder(before, after)
    except UsageError as error:
        return replace(report, unverifiable=f"the reference model has unknown inputs: {error}")
    candidate = _decoder(after, before)
    static = fixed_size(reference.inputs, before.inputs, "sequence")
    if static is None and isinstance(candidate, UncachedDecoder):  # a cached decoder pads its calls
        static = candidate.length
    in_steps = static is None and isinstance(reference, CachedDecoder) and isinstance(candidate, CachedDecoder)
    count_padding = candidate.inputs.positions_not_in(reference.inputs)
    outputs = (candidate if isinstance(candidate, CachedDecoder) else reference).outputs
    comparisons = []
    for text in _texts(static, reference.batch or candidate.batch or 2, reference.inputs.masked, seed):
        try:
            scenario, expected = _run_reference(reference, text, in_steps)
        except RunError as failure:
            return replace(report, unverifiable=str(failure))
        found = _run(candidate, scenario, count_padding)
        calls = [
            _compare(scenario, one, other, scenario.mask[:, past:total], report.bound, outputs)
            for (past, total), one, other in zip(scenario.spans, expected, found, strict=True)
        ]
        worst = max(calls, key=lambda comparison: comparison.error or 0.0)
        if worst.reason and in_steps and not _is_stable(reference, text, expected[-1], report.bound):
            worst = replace(worst, verdict="unknown", reason=UNSTABLE)
        comparisons.append(worst)
    unstable = all(comparison.verdict == "unknown" for comparison in comparisons)
    return replace(report, comparisons=tuple(comparisons), unverifiable=UNSTABLE if unstable else None)


def _texts(static: int | None, batch: int, masked: bool, seed: int) -> Iterator[Scenario]:
    """Yield texts in one chunk; the last has left padding if the reference takes a mask."""
    random = np.random.default_rng(seed)
    for number, length in enumerate(LENGTHS if static is None else (static, static)):
        mask = np.ones((batch, length), np.int64)
        if masked and number:
            mask[(batch - 1) % 2 :: 2, : min(PADDING, length - 1)] = 0
        name = "no padding" if mask.all() else "left padding"
        tokens = random.integers(0, VOCABULARY, (batch, length))
        yield Scenario(name=name, tokens=tokens, mask=mask, chunks=(length,))


def _run_reference(reference: AnyDecoder, text: Scenario, in_steps: bool) -> tuple[Scenario, list[Outputs]]:
    """Return the text with chunks that the model takes, several tokens after a past if it can, and their outputs.

    Raises:
        RunError: The model fails.
    """
    if not in_steps:
        return text, _run(reference, text)
    length = text.tokens.shape[1]
    scenario = replace(text, chunks=(length - 3, 1, 2))
    try:
        return scenario, _run(reference, scenario)
    except RunError:
        scenario = replace(text, chunks=(length - 2, 1, 1))
        return scenario, _run(reference, scenario)


def _run(decoder: AnyDecoder, scenario: Scenario, count_padding: Collection[str] = ()) -> list[Outputs]:
    """Return the outputs of each call; a decoder without a cache runs the whole text in one."""
    feeds = decoder.inputs.feeds(scenario.tokens, scenario.mask, count_padding=count_padding)
    if isinstance(decoder, UncachedDecoder):
        return [decoder.run(feeds)]
    decoder.reset()
    return [decoder.advance(decoder.inputs.part(feeds, past, total)) for past, total in scenario.spans]


def _is_stable(reference: AnyDecoder, text: Scenario, last: Outputs, bound: float) -> bool:
    """Whether one call for the whole text gives the outputs of the last of several; some models take no padding so."""
    shape = text.tokens.shape
    (whole,) = _run(reference, text)
    rows = {
        name: array[:, shape[1] - last[name].shape[1] :]
        for name, array in whole.items()
        if array.shape[:2] == shape and last[name].ndim > 1
    }
    new = next((array.shape[1] for array in rows.values()), 0)
    return _compare(text, rows, last, text.mask[:, shape[1] - new :], bound, reference.outputs).reason is None


def _compare(
    scenario: Scenario, expected: Outputs, found: Outputs, mask: Tokens, bound: float, outputs: Sequence[ValueInfo]
) -> Comparison:
    """Return the comparison of the outputs of one call: that of the output with the largest error."""
    known = {tensor.name: tensor for tensor in outputs}
    worst = Comparison.of(scenario, verdict="same", error=0.0)
    for name, values in expected.items():
        array = found.get(name)
        if array is None or array.shape != values.shape:
            shape = "missing" if array is None else f"of shape {list(array.shape)}"
            reason = f"output `{name}` is {shape}, expected {list(values.shape)}"
            return replace(worst, verdict="different", error=np.inf, output=name, reason=reason)
        axes = token_axes(known[name], values.shape, mask.shape) if name in known else None
        if axes is not None:
            values, array = (np.moveaxis(one, axes, (0, 1))[mask.astype(bool)] for one in (values, array))
        error = distance(values, array, spread(values), equal_nan=True)
        if error >= (worst.error or 0.0):
            worst = replace(worst, error=error, output=name)
    if not (worst.error or 0.0) <= bound:
        reason = f"error of `{worst.output}` is {worst.error:.1e} of its spread (bound {bound:.0e})"
        worst = replace(worst, verdict="different", reason=reason)
    return worst


def _decoder(session: Session, other: Session) -> AnyDecoder:
    """Return a decoder on a session.

    Its cache is the inputs that names and dims show, the other model's dims for inputs of the same name included, and
    those that the other model lacks.
    """
    names = {tensor.name for tensor in (*other.inputs, *other.outputs)}
    presents = [one for one in session.outputs if "present" in one.name or _is_new(one, names)]
    new = [one for one in session.inputs if _is_new(one, names) and may_be_past(one, presents or session.outputs)]
    renamed = [(one, _with_dims_of(one, other.inputs)) for one in session.inputs]
    pasts = [past for one, past in renamed if is_past(one) or is_past(past) or one in new]
    if not pasts:
        return UncachedDecoder(session)
    presents = presents or find_presents(pasts, session.outputs)
    return CachedDecoder(session, cache_entries(pasts, presents, read_cache_metadata(session.metadata).layouts))


def _with_dims_of(past: ValueInfo, others: Sequence[ValueInfo]) -> ValueInfo:
    """Return a past with the dims of the other model's input of the same name, if all its numbers are equal there."""
    for other in others:
        if other.name == past.name and len(other.dims) == len(past.dims):
            pairs = list(zip(past.dims, other.dims, strict=True))
            if all(own == dim for own, dim in pairs if isinstance(own, int)):
                return replace(past, dims=tuple(dim for _, dim in pairs))
    return past


def _is_new(tensor: ValueInfo, names: Collection[str]) -> bool:
    return tensor.name not in names and len(tensor.dims) > 2
