"""The reference model, and the limits of what it computes correctly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from kvsurgeon.errors import RunError
from kvsurgeon.parity.chunked_run import run_in_chunks
from kvsurgeon.parity.difference import distance, error_map, spread
from kvsurgeon.parity.reference_outputs import ReferenceOutputs
from kvsurgeon.parity.scenarios import Scenario, TextLengths
from kvsurgeon.runtime import AnyDecoder, Array, CachedDecoder, DecoderInputs, Session, Tokens, UncachedDecoder

_SMALLEST_VOCABULARY = 2
_LARGEST_VOCABULARY = 2**17  # token IDs of a model without logits


@dataclass(frozen=True, kw_only=True)
class ReferenceModel:
    """The reference model as a decoder, and the texts that it takes.

    Attributes:
        decoder: The model.
        vocabulary: Number of token IDs.
        token_types: Number of token types.
        lengths: Sizes of the texts.
        bound: Largest error at which its outputs are equal.
        longest: The longest text that both models take, if it is known.
        single_row: Whether batches of several rows fail or give other outputs.
        noise: Largest error between its outputs for the same tokens in other calls: shorter, or of one row.
        prefix_stable: Whether its outputs do not depend on later tokens, within the tolerance.
        notes: Remarks for the report.
    """

    decoder: AnyDecoder
    vocabulary: int
    token_types: int = 1
    lengths: TextLengths
    bound: float
    longest: int | None = None
    single_row: bool = False
    noise: float = 0.0
    prefix_stable: bool = True
    notes: tuple[str, ...] = ()

    @property
    def inputs(self) -> DecoderInputs:
        """Inputs of the model."""
        return self.decoder.inputs

    @property
    def main(self) -> str:
        """Name of the output of logits, or of the first output if no output holds floating-point numbers."""
        floating = any(output.floating for output in self.decoder.outputs)
        return self.decoder.logits if floating else self.decoder.outputs[0].name

    def run(self, scenario: Scenario, *, in_calls: bool) -> ReferenceOutputs:
        """Return all outputs for a scenario.

        Args:
            scenario: The text.
            in_calls: Whether to run the calls of the scenario, if the model has a cache, and not the whole text.

        Raises:
            RunError: The model fails.
        """
        in_calls = in_calls and bool(self.decoder.cache)
        feeds = self.feeds(scenario.tokens, scenario.mask, block=scenario.chunks[0])
        run = run_in_chunks(self.decoder, feeds, scenario.spans if in_calls else [(0, scenario.tokens.shape[1])])
        if run.failure:
            raise RunError(run.failure)
        return ReferenceOutputs(scenario=scenario, calls=run.outputs, in_calls=in_calls)

    def outputs(self, tokens: Tokens, mask: Tokens | None = None, block: int = 0, output: str | None = None) -> Array:
        """Return an output for texts, the main one if none is named; see `DecoderInputs.feeds`.

        There is no padding unless a mask is given.

        Raises:
            RunError: The model fails.
        """
        rows = _full_batch(self.decoder, tokens)
        feeds = self.feeds(rows, np.ones_like(rows) if mask is None else _full_batch(self.decoder, mask), block)
        found = self.decoder.run(feeds)[output or self.main]
        return found if len(rows) == len(tokens) else found[: len(tokens)]

    def padding_stable(self, expected: ReferenceOutputs) -> bool:
        """Whether outputs after padding do not depend on later tokens, nor on the number of masked tokens alone.

        Some models take right padding only: they count the tokens of the mask, and read the first ones.

        Raises:
            RunError: The model fails on the scenario.
        """
        scenario = expected.scenario
        tokens, mask, whole = scenario.tokens, scenario.mask, expected.calls[0][self.main]
        ends = [total for _, total in scenario.spans][:-1]
        if mask.all() or not ends or expected.in_calls or not self.prefix_stable or whole.shape[:2] != tokens.shape:
            return True  # the last: an output of the last token only
        scale = spread(whole)
        masked = np.flatnonzero((mask == 0).any(axis=0))
        around = [end for end in (masked[0], masked[-1] + 1) if 0 < end < tokens.shape[1]]
        block = scenario.chunks[0] if any(spec.kind == "block" for spec in self.inputs.specs) else 0
        checked = [end for end in (ends[0], ends[len(ends) // 2], *map(int, around)) if end >= block]
        counts = (mask[:, 1:] < mask[:, :-1]).any() and self._counts_tokens(scenario, whole, scale, block)
        return not counts and all(self._same_before(end, scenario, whole, scale) for end in dict.fromkeys(checked))

    def _counts_tokens(self, scenario: Scenario, whole: Array, scale: float, block: int) -> bool:
        """Whether the outputs depend on how many tokens between others are masked, but not on which."""
        tokens, mask = scenario.tokens, scenario.mask
        moved = mask.copy()
        moved[:, 1:-1] = np.roll(mask[:, 1:-1], 2, axis=1)  # by one, a token after a hole would keep its position
        counted = (mask & moved).astype(bool)
        others = [self.outputs(tokens, other, block) for other in (moved, np.ones_like(mask))]
        same, ignored = (distance(whole[counted], other[counted], scale) <= self.bound for other in others)
        return same and not ignored and bool((moved != mask).any())

    def _same_before(self, end: int, scenario: Scenario, whole: Array, scale: float) -> bool:
        """Whether the outputs up to a token are the same if no token follows."""
        tokens, mask, block = scenario.tokens, scenario.mask, scenario.chunks[0]
        if self.decoder.length is None:
            prefix = self.outputs(tokens[:, :end], mask[:, :end], block)
        else:
            prefix = self.outputs(tokens, np.where(np.arange(tokens.shape[1]) < end, mask, 0), block)
        counted = mask[:, :end].astype(bool)
        return distance(whole[:, :end][counted], prefix[:, :end][counted], scale) <= self.bound

    def call_stable(self, expected: ReferenceOutputs) -> bool:
        """Whether the calls of a scenario give the outputs of a single call.

        Raises:
            RunError: The model fails on the whole text.
        """
        scenario = expected.scenario
        whole = self.run(scenario, in_calls=False)
        scale = spread(whole.basis(self.main))
        for call, (past, total) in enumerate(scenario.spans):
            found = expected.by_rows(self.main, expected.calls[call][self.main], total - past)
            part = whole.part(self.main, 0, found.shape, (past, total), None)
            if part is None or found.shape[:2] != (len(scenario.tokens), total - past):
                continue
            counted = scenario.mask[:, past:total].astype(bool)
            if distance(part[counted], found[counted], scale) > self.bound:
                return False
        return True

    def on(self, session: Session) -> ReferenceModel:
        """Return this model with another session."""
        if self.decoder.cache:
            decoder: AnyDecoder = CachedDecoder(session, self.decoder.cache)
            decoder.use_inputs(self.inputs)
        else:
            decoder = UncachedDecoder(session, self.inputs)
        decoder.use_orders(self.decoder.orders)
        return replace(self, decoder=decoder)

    def distance_to(
        self, other: ReferenceModel, tokens: Tokens, mask: Tokens | None = None, output: str | None = None
    ) -> float:
        """Return the error of the same model in another session, on tokens that are not masked.

        It is that of the main output, or of another one that is named.

        Raises:
            RunError: A session fails.
        """
        expected, found = (model.outputs(tokens, mask, output=output) for model in (self, other))
        if mask is None or expected.shape[:2] != mask.shape:
            return distance(expected, found)
        scale, counted = spread(expected), mask.astype(bool)
        return distance(expected[counted], found[counted], scale)

    def token_errors(self, other: ReferenceModel, scenario: Scenario) -> Array | None:
        """Return the error of the same model in another session for each token, `[batch, sequence]`.

        None is returned if the outputs do not have a row for each token.

        Raises:
            RunError: A session fails.
        """
        expected, found = (model.outputs(scenario.tokens, scenario.mask) for model in (self, other))
        if expected.shape[:2] != scenario.mask.shape:
            return None
        scale = np.asarray(spread(expected[scenario.mask.astype(bool)]))
        return error_map(expected, found, batch=0, sequence=1, scale=scale)

    def feeds(self, tokens: Tokens, mask: Tokens, block: int = 0) -> dict[str, Array]:
        """Return the feeds of texts; see `DecoderInputs.feeds`."""
        return self.inputs.feeds(tokens, mask, token_types=self.token_types, block=block)


def probe_reference(
    decoder: AnyDecoder, lengths: TextLengths, length: int | None, bound: float, seed: int
) -> ReferenceModel:
    """Return the reference model with its limits, found by running it.

    Args:
        decoder: The model.
        lengths: Wanted sizes of the texts.
        length: The only length of a text that both models take; None for any.
        bound: Largest error at which outputs are equal.
        seed: Random seed.

    Raises:
        RunError: The model fails on all texts.
    """
    random = np.random.default_rng(seed)
    short = length or _longest(decoder, lengths.short)
    lengths_of = replace(lengths, short=short)
    model = ReferenceModel(decoder=decoder, vocabulary=_SMALLEST_VOCABULARY, lengths=lengths_of, bound=bound)
    model = replace(model, vocabulary=_vocabulary(model))
    model = replace(model, token_types=_token_types(model))
    long = length or _longest(decoder, max(lengths.long, short), known=short)
    model = replace(model, lengths=replace(model.lengths, long=long))
    notes = []
    if long < lengths.long:
        notes.append(f"the longest text has {long} tokens: the reference model takes no more")
        model = replace(model, longest=long)
    batch_noise = 0.0 if decoder.batch or lengths.batch < 2 else _batch_noise(model, random)
    noise, ignores_past = _prefix_noise(model, bound, random)
    if not noise <= bound:
        notes.append(
            "the reference model's logits depend on later tokens: it is not causal, or depends on the length, and no "
            "cache can equal it"
        )
    if ignores_past:
        notes.append("the reference model's logits hardly depend on earlier tokens: a wrong cache may go unnoticed")
    single_row = not batch_noise <= bound
    if single_row:
        notes.append("the reference model is correct for batch size 1 only: batches were not compared")
    return replace(
        model, longest=length or model.longest, single_row=single_row, prefix_stable=noise <= bound, notes=tuple(notes),
        noise=max(noise, 0.0 if single_row else batch_noise),
    )  # fmt: skip


def _full_batch(decoder: AnyDecoder, tokens: Tokens) -> Tokens:
    """Return texts with as many rows as a model with a cache takes: the rows repeat."""
    fixed = decoder.batch if decoder.cache else None
    return tokens if fixed is None else tokens[np.arange(fixed) % len(tokens)]


def _longest(decoder: AnyDecoder, wanted: int, known: int = 0) -> int:
    """Return the greatest length up to `wanted` at which the decoder runs; it is known to run at `known`.

    Tokens of two numbers are run, because positions may count all tokens but those of one number.
    """

    def failure(length: int) -> RunError | None:
        mask = np.ones((decoder.batch or 1, length), np.int64)
        texts = (decoder.inputs.feeds(mask * token, mask) for token in (0, 1))
        return next((error for feeds in texts if (error := _failure(partial(decoder.run, feeds)))), None)

    if failure(wanted) is None:
        return wanted
    if not known:
        known, smallest = 1, failure(1)
        if smallest is not None:
            raise smallest
    while wanted - known > 1:
        middle = (known + wanted) // 2
        known, wanted = (known, middle) if failure(middle) else (middle, wanted)
    return known


def _vocabulary(model: ReferenceModel) -> int:
    """Return the number of token IDs: the number of logits, or less if there are fewer embeddings."""
    tokens = np.zeros((1, model.lengths.short), np.int64)

    def takes(size: int) -> bool:
        tokens[0, -1] = size - 1
        return _failure(lambda: model.outputs(tokens)) is None

    array = model.outputs(tokens)
    floating = array.ndim > 1 and array.dtype.kind not in "biu"
    size = max(array.shape[-1] if floating else _LARGEST_VOCABULARY, _SMALLEST_VOCABULARY)
    while size > _SMALLEST_VOCABULARY and not takes(size):
        size //= 2
    return size


def _token_types(model: ReferenceModel) -> int:
    if not any(spec.kind == "token_types" for spec in model.inputs.specs):
        return 1
    tokens = np.arange(model.lengths.short)[None] % model.vocabulary
    return 1 if _failure(lambda: replace(model, token_types=2).outputs(tokens)) else 2


def _batch_noise(model: ReferenceModel, random: np.random.Generator) -> float:
    """Return the error of a batch from two of its rows alone; infinite if it fails."""
    tokens = random.integers(0, model.vocabulary, (model.lengths.batch, model.lengths.short))
    feeds = model.feeds(tokens, np.ones_like(tokens))
    try:
        together = model.decoder.run(feeds)[model.main]
    except RunError:
        return np.inf
    rows_of = [model.inputs.rows(feeds, [row]) for row in (0, len(tokens) - 1)]
    alone = [model.decoder.run(part)[model.main] for part in rows_of]
    rows = np.concatenate(alone) if alone[0].ndim else np.stack(alone)
    if together.ndim and len(together) % len(tokens) == 0:  # batch and tokens may share an axis
        size = len(together) // len(tokens)
        together = np.concatenate([together[:size], together[-size:]])
    return distance(together, rows) if rows.shape == together.shape else np.inf


def _prefix_noise(model: ReferenceModel, bound: float, random: np.random.Generator) -> tuple[float, bool]:
    """Return the error of outputs of prefixes, and whether outputs ignore the first token of a text."""
    short, long = model.lengths.short, model.lengths.long
    tokens = random.integers(0, model.vocabulary, (1, long))
    whole = model.outputs(tokens)
    if short < 2 or whole.shape[1:2] != (long,):  # an output of the last token only
        return 0.0, False
    scale = spread(whole)
    lengths = {1, short, long // 2}  # kernels of a single token differ from those of several
    noise = max(distance(whole[:, :length], _prefix(model, tokens, length), scale) for length in lengths)
    tokens[0, 0] = (tokens[0, 0] + 1) % model.vocabulary
    return noise, distance(whole[:, 1:], model.outputs(tokens)[:, 1:], scale) <= bound


def _prefix(model: ReferenceModel, tokens: Tokens, length: int) -> Array:
    """Return the output for a prefix: run alone, or followed by other tokens if the length is fixed."""
    if model.decoder.length is None and model.lengths.short != model.lengths.long:
        return model.outputs(tokens[:, :length])
    others = tokens.copy()
    others[:, length:] = (others[:, length:] + 1) % model.vocabulary
    return model.outputs(others)[:, :length]


def _failure(run: Callable[[], object]) -> RunError | None:
    try:
        run()
    except RunError as error:
        return error
    return None
