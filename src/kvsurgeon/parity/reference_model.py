"""The reference model, and the limits of what it computes correctly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kvsurgeon.errors import RunError
from kvsurgeon.parity.difference import distance, spread
from kvsurgeon.parity.scenarios import Scenario, TextLengths
from kvsurgeon.runtime import Array, DecoderInputs, Session, Tokens, UncachedDecoder

_SMALLEST_VOCABULARY = 2


@dataclass(frozen=True, kw_only=True)
class ReferenceModel:
    """A decoder without a cache, and the texts that it takes.

    Attributes:
        decoder: The model.
        vocabulary: Number of token IDs.
        token_types: Number of token types.
        lengths: Sizes of the texts.
        single_row: Whether batches of several rows fail or give other logits.
        noise_floor: Error between its logits for the same tokens with and without later tokens.
        prefix_stable: Whether this error is within the tolerance.
        notes: Remarks for the report.
    """

    decoder: UncachedDecoder
    vocabulary: int
    token_types: int = 1
    lengths: TextLengths
    single_row: bool = False
    noise_floor: float = 0.0
    prefix_stable: bool = True
    notes: tuple[str, ...] = ()

    @property
    def inputs(self) -> DecoderInputs:
        """Inputs of the model."""
        return self.decoder.inputs

    def run(self, scenario: Scenario) -> dict[str, Array]:
        """Return all outputs for a scenario.

        Raises:
            RunError: The model fails.
        """
        return self._run(scenario.tokens, scenario.mask)

    def logits(self, tokens: Tokens, mask: Tokens | None = None) -> Array:
        """Return the logits of texts, without padding unless a mask is given.

        Raises:
            RunError: The model fails.
        """
        return self._run(tokens, np.ones_like(tokens) if mask is None else mask)[self.decoder.logits]

    def padding_stable(self, scenario: Scenario, bound: float) -> bool:
        """Whether the logits after left padding do not depend on later tokens; some models take right padding only.

        Raises:
            RunError: The model fails on the scenario.
        """
        first, tokens, mask = scenario.chunks[0], scenario.tokens, scenario.mask
        if mask.all() or first == tokens.shape[1]:
            return True
        whole = self.logits(tokens, mask)
        if self.decoder.length is None:
            prefix = self.logits(tokens[:, :first], mask[:, :first])
        else:
            prefix = self.logits(tokens, np.where(np.arange(tokens.shape[1]) < first, mask, 0))
        if whole.shape[:2] != tokens.shape:  # logits of the last token only
            return True
        counted = mask[:, :first].astype(bool)
        return distance(whole[:, :first][counted], prefix[:, :first][counted], spread(whole)) <= bound

    def distance_to(self, session: Session, seed: int) -> float:
        """Return the error of the logits of another session on the model, for a long text.

        Raises:
            RunError: The other session fails.
        """
        tokens = np.random.default_rng(seed).integers(0, self.vocabulary, (self.decoder.batch or 1, self.lengths.long))
        other = replace(self, decoder=UncachedDecoder(session, self.inputs))
        logits = self.logits(tokens)
        return distance(logits, other.logits(tokens), spread(logits))

    def _run(self, tokens: Tokens, mask: Tokens) -> dict[str, Array]:
        return self.decoder.run(self.inputs.feeds(tokens, mask, token_types=self.token_types))


def probe_reference(decoder: UncachedDecoder, lengths: TextLengths, bound: float, seed: int) -> ReferenceModel:
    """Return the reference model with its limits, found by running it.

    Args:
        decoder: The model.
        lengths: Wanted sizes of the texts.
        bound: Largest error at which logits are equal.
        seed: Random seed.

    Raises:
        RunError: The model fails on all texts.
    """
    random = np.random.default_rng(seed)
    short = decoder.length or _longest(decoder, lengths.short)
    model = ReferenceModel(decoder=decoder, vocabulary=_SMALLEST_VOCABULARY, lengths=replace(lengths, short=short))
    vocabulary = model.logits(np.zeros((1, short), np.int64)).shape[-1]
    model = replace(model, vocabulary=_vocabulary(model, vocabulary, random))
    model = replace(model, token_types=_token_types(model))
    long = decoder.length or _longest(decoder, max(lengths.long, short), known=short)
    model = replace(model, lengths=replace(model.lengths, long=long))
    notes = [f"the longest text has {long} tokens: the reference model takes no more"] if long < lengths.long else []
    single_row = not decoder.batch and lengths.batch > 1 and not _takes_batches(model, bound, random)
    noise_floor, ignores_past = _prefix_noise(model, bound, random)
    if not noise_floor <= bound:
        notes.append(
            "the reference model's logits depend on later tokens: it is not causal, or depends on the length, and no "
            "cache can equal it"
        )
    if ignores_past:
        notes.append("the reference model's logits hardly depend on earlier tokens: a wrong cache may go unnoticed")
    if single_row:
        notes.append("the reference model is correct for batch size 1 only: batches were not compared")
    return replace(
        model, single_row=single_row, prefix_stable=noise_floor <= bound, noise_floor=noise_floor, notes=tuple(notes)
    )


def _longest(decoder: UncachedDecoder, wanted: int, known: int = 0) -> int:
    """Return the greatest length up to `wanted` at which the decoder runs; it is known to run at `known`."""

    def failure(length: int) -> RunError | None:
        tokens = np.zeros((1, length), np.int64)
        return _failure(lambda: decoder.run(decoder.inputs.feeds(tokens, np.ones_like(tokens))))

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


def _vocabulary(model: ReferenceModel, size: int, random: np.random.Generator) -> int:
    """Return the number of token IDs: the number of logits, or less if there are fewer embeddings."""
    size = max(size, _SMALLEST_VOCABULARY)
    while size > _SMALLEST_VOCABULARY:
        tokens = random.integers(0, size, (1, model.lengths.short))
        tokens[0, -1] = size - 1
        if _failure(lambda tokens=tokens: model.logits(tokens)) is None:  # type: ignore[misc]
            return size
        size //= 2
    return size


def _token_types(model: ReferenceModel) -> int:
    if not any(spec.kind == "token_types" for spec in model.inputs.specs):
        return 1
    tokens = np.arange(model.lengths.short)[None] % model.vocabulary
    return 1 if _failure(lambda: replace(model, token_types=2).logits(tokens)) else 2


def _takes_batches(model: ReferenceModel, bound: float, random: np.random.Generator) -> bool:
    """Whether a batch gives the same logits as its rows alone."""
    tokens = random.integers(0, model.vocabulary, (model.lengths.batch, model.lengths.short))
    try:
        together = model.logits(tokens)
    except RunError:
        return False
    rows = np.concatenate([model.logits(tokens[row : row + 1]) for row in range(len(tokens))])
    return rows.shape == together.shape and distance(rows, together, spread(rows)) <= bound


def _prefix_noise(model: ReferenceModel, bound: float, random: np.random.Generator) -> tuple[float, bool]:
    """Return the error of logits of prefixes, and whether logits ignore the first token of a text."""
    short, long = model.lengths.short, model.lengths.long
    tokens = random.integers(0, model.vocabulary, (1, long))
    whole = model.logits(tokens)
    if short < 2 or whole.shape[1:2] != (long,):  # logits of the last token only
        return 0.0, False
    scale = spread(whole)
    lengths = {1, long // 2}  # kernels of a single token differ from those of several
    noise = max(distance(whole[:, :length], _prefix_logits(model, tokens, length), scale) for length in lengths)
    tokens[0, 0] = (tokens[0, 0] + 1) % model.vocabulary
    return noise, distance(whole[:, 1:], model.logits(tokens)[:, 1:], scale) <= bound


def _prefix_logits(model: ReferenceModel, tokens: Tokens, length: int) -> Array:
    """Return the logits of a prefix: run alone, or followed by other tokens if the length is fixed."""
    if model.decoder.length is None:
        return model.logits(tokens[:, :length])
    others = tokens.copy()
    others[:, length:] = (others[:, length:] + 1) % model.vocabulary
    return model.logits(others)[:, :length]


def _failure(run: Callable[[], object]) -> RunError | None:
    try:
        run()
    except RunError as error:
        return error
    return None
