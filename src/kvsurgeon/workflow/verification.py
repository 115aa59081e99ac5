"""Whether a model after surgery computes what it computed before, whichever way it is to be asked."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from kvsurgeon.errors import KvsurgeonError, MissingKernelError, RunError, UsageError
from kvsurgeon.parity import TOLERANCES, Progress, Report, Verdict, arithmetic_of, verify
from kvsurgeon.parity.difference import spread
from kvsurgeon.parity.tolerance import load_graph
from kvsurgeon.runtime import (
    Array,
    CachedDecoder,
    Session,
    Source,
    Tensor,
    Tokens,
    UncachedDecoder,
    cache_entries,
    find_presents,
    fixed_size,
    from_proto,
    is_past,
    may_be_past,
    open_session,
    read_cache_metadata,
    token_axes,
)

CONTEXT = "kvsurgeon.context"  # key of the note in a file's metadata: how a host makes masks and tables
LENGTHS = (7, 13)  # tokens of the texts that both models are given; a static model is given its own length
PADS = 3  # of them padding on the left, in every second row of the last text
VOCABULARY = 16  # ids that any model knows

Counted = npt.NDArray[np.bool_]  # [batch, sequence]: which tokens are no padding


@dataclass(frozen=True, kw_only=True)
class Sameness:
    """What the judge says of a model after surgery.

    Attributes:
        verdict: "unknown" where the original cannot be run here, or it is not known what to give the result.
        problems: What stands against it, a sentence each.
        report: All that was tried, where a cache came in.
    """

    verdict: Verdict
    problems: tuple[str, ...] = ()
    report: Report | None = None


def judge(
    original: Source,
    result: Source,
    *,
    folder: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sameness:
    """Run both models and say whether they agree.

    A cache that came in is put to the full trial of `kvsurgeon.parity`. Otherwise both are asked alike: the same
    texts, all outputs but the cache compared; in several calls where both have a cache.
    """
    models = load_graph(original), load_graph(result)
    graphs = models[0].graph, models[1].graph
    gained, lost = (
        {value.name for value in one.output} - {value.name for value in other.output}
        for one, other in (graphs[::-1], graphs)
    )
    made = _made_by_hosts(models[1]) - _made_by_hosts(models[0])
    if made:
        said = f"`{min(made)}` holds numbers that a host makes by the file's note `{CONTEXT}`, and the judge makes none"
        return Sameness(verdict="unknown", problems=(said,))
    # its presents may be outputs that the original had by that name
    came_in = {one.name for one in graphs[1].input if is_past(from_proto(one))} - {one.name for one in graphs[0].input}
    if not lost and (gained or came_in):
        report = verify(original, result, folder=folder, seed=seed, progress=progress)
        return Sameness(verdict=report.verdict, problems=report.problems, report=report)
    try:
        before = open_session(original, folder=folder, name="the original")
    except MissingKernelError as error:
        return Sameness(verdict="unknown", problems=(str(error),))
    try:
        after = open_session(result, folder=folder, name="the result")
        problems = tuple(_differences(before, after, TOLERANCES[arithmetic_of(load_graph(original))].error, seed))
    except _OriginalError as error:
        return Sameness(verdict="unknown", problems=(str(error),))
    except KvsurgeonError as error:
        return Sameness(verdict="different", problems=(str(error),))
    return Sameness(verdict="different" if problems else "same", problems=problems)


def _made_by_hosts(model: onnx.ModelProto) -> set[str]:
    """Inputs whose numbers a host makes by what the file notes; masks that only hide, and places, are none of them."""
    note = next((one.value for one in model.metadata_props if one.key == CONTEXT), "{}")
    try:
        told = json.loads(note).get("inputs", {}).items()
        return {name for name, how in told if how.get("seen") != 0 and not _counts(how.get("table"))}
    except (ValueError, AttributeError):  # somebody else's note
        return set()


def _counts(table: object) -> bool:
    """Whether a table holds the places of its rows."""
    return isinstance(table, list) and table == [*range(len(table))]


class _OriginalError(RunError):
    """The original itself cannot be run on what it is given."""


def _differences(before: Session, after: Session, allowed: float, seed: int) -> Iterator[str]:
    try:
        original = _decoder(before, after)
    except UsageError as error:
        raise _OriginalError(f"it is not known how to ask the original: {error}") from error
    changed = _decoder(after, before)
    static = fixed_size(original.inputs, before.inputs, "new")
    if static is None and isinstance(changed, UncachedDecoder):  # else a host fills up its calls
        static = fixed_size(changed.inputs, after.inputs, "new")
    batch = (
        fixed_size(original.inputs, before.inputs, "batch") or fixed_size(changed.inputs, after.inputs, "batch") or 2
    )
    random = np.random.default_rng(seed)
    told = next((one for one in (changed, original) if isinstance(one, CachedDecoder)), None)
    outputs = {tensor.name: tensor for tensor in (told.outputs if told else before.outputs)}
    judged = False
    for tokens, mask in _texts(static, batch, original.inputs.masked, random):
        length = tokens.shape[1]
        stepwise = static is None and isinstance(original, CachedDecoder) and isinstance(changed, CachedDecoder)
        ends, expected = _asked(original, tokens, mask, _ways(length) if stepwise else [(length,)])
        found = _answers(changed, tokens, mask, ends, changed.inputs.placing(original.inputs))
        counted = mask.astype(bool)
        problems = [
            problem
            for (past, total), one, other in zip(_calls(ends), expected, found, strict=True)
            for problem in _compared(one, other, counted[:, past:total], allowed, outputs)
        ]
        if problems and stepwise and not _agrees_with_itself(original, tokens, mask, expected, allowed):
            continue
        judged = True
        yield from problems
    if not judged:
        raise _OriginalError("the original does not give in several calls what it gives in one")


def _ways(length: int) -> Sequence[Sequence[int]]:
    """Where the calls end: several tokens behind a past, or else one at a time."""
    return (length - 3, length - 2, length), (length - 2, length - 1, length)


def _asked(
    original: CachedDecoder | UncachedDecoder, tokens: Tokens, mask: Tokens, ways: Sequence[Sequence[int]]
) -> tuple[Sequence[int], list[dict[str, Array]]]:
    """What the original answers, in the first of these ways in which it can be asked.

    Raises:
        _OriginalError: It cannot be run in any.
    """
    failure: RunError | None = None
    for ends in ways:
        try:
            return ends, _answers(original, tokens, mask, ends)
        except RunError as error:
            failure = failure or error
    raise _OriginalError(str(failure)) from failure


def _agrees_with_itself(
    original: CachedDecoder | UncachedDecoder, tokens: Tokens, mask: Tokens,
    answers: Sequence[Mapping[str, Array]], allowed: float,
) -> bool:  # fmt: skip
    """Whether the last of several calls gives what one call for all tokens gives: some models take no padding so."""
    whole, last = _answers(original, tokens, mask, (tokens.shape[1],))[0], answers[-1]
    size = tokens.shape[1]
    rows = {
        name: array[:, size - last[name].shape[1] :]
        for name, array in whole.items()
        if array.shape[:2] == tokens.shape and last[name].ndim > 1
    }
    new = next((array.shape[1] for array in rows.values()), 0)
    outputs = {tensor.name: tensor for tensor in original.session.outputs}
    return not any(_compared(rows, last, mask[:, size - new :].astype(bool), allowed, outputs))


def _texts(
    static: int | None, batch: int, masked: bool, random: np.random.Generator
) -> Iterator[tuple[Tokens, Tokens]]:
    """Texts and their masks, [batch, length]; the last is padded where both models can be told so."""
    lengths = LENGTHS if static is None else (static, static)
    for number, length in enumerate(lengths):
        mask = np.ones((batch, length), np.int64)
        if masked and number == len(lengths) - 1:
            mask[(batch - 1) % 2 :: 2, : min(PADS, length - 1)] = 0
        yield random.integers(0, VOCABULARY, (batch, length)), mask


def _compared(
    expected: Mapping[str, Array], found: Mapping[str, Array], counted: Counted, allowed: float,
    outputs: Mapping[str, Tensor],
) -> Iterator[str]:  # fmt: skip
    for name, values in expected.items():
        axes = token_axes(outputs[name], values.shape, counted.shape) if name in outputs else None
        distance = _distance(values, found.get(name), counted, axes)
        if distance is None or not distance <= allowed:
            what = "missing or of another shape" if distance is None else f"off by {distance:.1e} of its spread"
            yield f"expected output `{name}` as before, found it {what} (allowed {allowed:.0e})"


def _answers(
    decoder: CachedDecoder | UncachedDecoder, tokens: Tokens, mask: Tokens, ends: Sequence[int],
    by_place: Collection[str] = (),
) -> list[dict[str, Array]]:  # fmt: skip
    """What the decoder answers to a text: whole, or in calls that end at these places where it has a cache."""
    feeds = decoder.inputs.whole(tokens, mask, by_place=by_place)
    if isinstance(decoder, UncachedDecoder):
        return [decoder.run(feeds)]
    decoder.reset()
    return [decoder.advance(decoder.inputs.part(feeds, past, total)) for past, total in _calls(ends)]


def _calls(ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The past and the total length of each call."""
    return itertools.pairwise((0, *ends))


def _decoder(session: Session, other: Session) -> CachedDecoder | UncachedDecoder:
    """The model to be asked.

    Its cache is what its names and dims say, or those of the other's inputs called alike, and what it has in and out
    that the other has not.
    """
    theirs = {tensor.name for tensor in (*other.inputs, *other.outputs)}
    presents = [one for one in session.outputs if "present" in one.name or _is_own(one, theirs)]
    own = [one for one in session.inputs if _is_own(one, theirs) and may_be_past(one, presents or session.outputs)]
    sized = [(one, _sized(one, other.inputs)) for one in session.inputs]
    pasts = [past for one, past in sized if is_past(one) or is_past(past) or one in own]
    if not pasts:
        return UncachedDecoder(session)
    presents = presents or find_presents(pasts, session.outputs)
    return CachedDecoder(session, cache_entries(pasts, presents, read_cache_metadata(session.metadata).layouts))


def _sized(past: Tensor, others: Sequence[Tensor]) -> Tensor:
    """The past, with the other model's words for its symbols: they may say a number, and mean the same lengths.

    Only where the other lies alike: all numbers of the past are the other's too, at the same places.
    """
    for other in others:
        if other.name == past.name and len(other.dims) == len(past.dims):
            pairs = list(zip(past.dims, other.dims, strict=True))
            if all(mine == theirs for mine, theirs in pairs if isinstance(mine, int)):
                return replace(past, dims=tuple(theirs for _, theirs in pairs))
    return past


def _is_own(tensor: Tensor, theirs: Collection[str]) -> bool:
    return tensor.name not in theirs and len(tensor.dims) > 2


def _distance(expected: Array, found: Array | None, counted: Counted, axes: tuple[int, int] | None) -> float | None:
    """How far the rows of tokens that count are apart; all there is, where tokens cannot be told apart."""
    if found is None or found.shape != expected.shape:
        return None
    if axes is not None:
        expected, found = (np.moveaxis(array, axes, (0, 1))[counted] for array in (expected, found))
    if not expected.size:
        return 0.0
    want, have = expected.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where((want == have) | (np.isnan(want) & np.isnan(have)), 0.0, np.abs(have - want))
    return float(apart.max() / spread(expected))
