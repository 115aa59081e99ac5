"""The original as a witness: what it can be asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kvsurgeon.errors import RunError
from kvsurgeon.parity.difference import distance, spread
from kvsurgeon.parity.scenarios import Scenario, TextLengths
from kvsurgeon.runtime import Array, Inputs, Session, Tokens, UncachedDecoder

_SMALLEST_VOCABULARY = 2


@dataclass(frozen=True, kw_only=True)
class Original:
    """A decoder without a cache, and within which bounds it works.

    Attributes:
        decoder: It.
        vocabulary: Ids that it takes are below this.
        types: Token types that it takes.
        lengths: How long texts may be.
        by_rows: It is right at batch 1 only.
        steady: It gives a token the same logits whatever follows.
        wobble: How far its logits for a token are apart where other tokens follow, over their spread.
        notes: What a reader should know of it.
    """

    decoder: UncachedDecoder
    vocabulary: int
    types: int = 1
    lengths: TextLengths
    by_rows: bool = False
    steady: bool = True
    wobble: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def inputs(self) -> Inputs:
        """What it is given."""
        return self.decoder.inputs

    def answer(self, scenario: Scenario) -> dict[str, Array]:
        """Return all its outputs for a scenario.

        Raises:
            RunError: It cannot be run on it.
        """
        return self.decoder.run(self.inputs.whole(scenario.tokens, scenario.mask, types=self.types))

    def reads_padding_alike(self, scenario: Scenario, allowed: float) -> bool:
        """Whether padding before a text means the same however many tokens follow; some models take it behind alone.

        Raises:
            RunError: It cannot be run on the scenario.
        """
        part, tokens, mask = scenario.chunks[0], scenario.tokens, scenario.mask
        if mask.all() or part == tokens.shape[1]:
            return True
        whole = self._logits(tokens, mask)
        if self.decoder.length is None:
            short = self._logits(tokens[:, :part], mask[:, :part])
        else:
            short = self._logits(tokens, np.where(np.arange(tokens.shape[1]) < part, mask, 0))
        if whole.shape[:2] != tokens.shape:  # logits of the last token alone
            return True
        counted = mask[:, :part].astype(bool)
        return distance(whole[:, :part][counted], short[:, :part][counted], spread(whole)) <= allowed

    def _logits(self, tokens: Tokens, mask: Tokens) -> Array:
        return self.decoder.run(self.inputs.whole(tokens, mask, types=self.types))[self.decoder.logits]

    def moved(self, session: Session, seed: int) -> float:
        """Return how far its logits for a long text are from those of another session with it, over their spread.

        Raises:
            RunError: It cannot be run there.
        """
        tokens = np.random.default_rng(seed).integers(0, self.vocabulary, (self.decoder.batch or 1, self.lengths.long))
        mine, theirs = self.logits(tokens), replace(self, decoder=UncachedDecoder(session, self.inputs)).logits(tokens)
        return distance(mine, theirs, spread(mine))

    def logits(self, tokens: Tokens) -> Array:
        """Return its logits for texts without padding.

        Raises:
            RunError: It cannot be run on them.
        """
        return self._logits(tokens, np.ones_like(tokens))


def examine(decoder: UncachedDecoder, lengths: TextLengths, allowed: float, seed: int) -> Original:
    """Return the original and the bounds within which it works, found by running it.

    Args:
        decoder: The original.
        lengths: How long texts should be.
        allowed: Error below which two answers are the same.
        seed: Where the texts come from.

    Raises:
        RunError: It cannot be run at all.
    """
    random = np.random.default_rng(seed)
    short = decoder.length or _longest(decoder, lengths.short)
    original = Original(decoder=decoder, vocabulary=_SMALLEST_VOCABULARY, lengths=replace(lengths, short=short))
    vocabulary = original.logits(np.zeros((1, short), np.int64)).shape[-1]
    original = replace(original, vocabulary=_vocabulary(original, vocabulary, random))
    original = replace(original, types=_types(original))
    long = decoder.length or _longest(decoder, max(lengths.long, short), known=short)
    original = replace(original, lengths=replace(original.lengths, long=long))
    by_rows = not decoder.batch and lengths.batch > 1 and not _batches(original, allowed, random)
    wobble, notes = _notes(original, lengths, allowed, random)
    if by_rows:
        notes.append("the original is right at batch 1 only: batches were not tried")
    return replace(original, by_rows=by_rows, steady=wobble <= allowed, wobble=wobble, notes=tuple(notes))


def _longest(decoder: UncachedDecoder, wanted: int, known: int = 0) -> int:
    """Return the greatest length up to the one wanted at which the decoder runs, one of `known` being given."""

    def failure(length: int) -> RunError | None:
        tokens = np.zeros((1, length), np.int64)
        return _failure(lambda: decoder.run(decoder.inputs.whole(tokens, np.ones_like(tokens))))

    reason = failure(wanted)
    if reason is None:
        return wanted
    if not known:
        known, smallest = 1, failure(1)
        if smallest is not None:
            raise smallest
    while wanted - known > 1:
        middle = (known + wanted) // 2
        known, wanted = (known, middle) if failure(middle) else (middle, wanted)
    return known


def _vocabulary(original: Original, claimed: int, random: np.random.Generator) -> int:
    """Return how many ids the embeddings hold: as many as there are logits, or fewer."""
    size = max(claimed, _SMALLEST_VOCABULARY)
    while size > _SMALLEST_VOCABULARY:
        tokens = random.integers(0, size, (1, original.lengths.short))
        tokens[0, -1] = size - 1
        if _failure(lambda tokens=tokens: original.logits(tokens)) is None:  # type: ignore[misc]
            return size
        size //= 2
    return size


def _types(original: Original) -> int:
    if not any(given.kind == "types" for given in original.inputs.given):
        return 1
    tokens = np.arange(original.lengths.short)[None] % original.vocabulary
    return 1 if _failure(lambda: replace(original, types=2).logits(tokens)) else 2


def _batches(original: Original, allowed: float, random: np.random.Generator) -> bool:
    """Whether a batch gives what its rows give one by one."""
    tokens = random.integers(0, original.vocabulary, (original.lengths.batch, original.lengths.short))
    try:
        together = original.logits(tokens)
    except RunError:
        return False
    rows = np.concatenate([original.logits(tokens[row : row + 1]) for row in range(len(tokens))])
    return rows.shape == together.shape and distance(rows, together, spread(rows)) <= allowed


def _notes(
    original: Original, wanted: TextLengths, allowed: float, random: np.random.Generator
) -> tuple[float, list[str]]:
    """Return how far the original is from itself where other tokens follow, and what a reader should know."""
    notes = []
    short, long = original.lengths.short, original.lengths.long
    if long < wanted.long:
        notes.append(f"the longest text has {long} tokens: the original takes no more")
    tokens = random.integers(0, original.vocabulary, (1, long))
    whole = original.logits(tokens)
    if short < 2 or whole.shape[1:2] != (long,):  # logits of the last token alone
        return 0.0, notes
    scale = spread(whole)
    prefixes = {1, long // 2}  # a single token is given to other kernels than several are
    wobble = max(distance(whole[:, :part], _prefix(original, tokens, part), scale) for part in prefixes)
    if not wobble <= allowed:
        notes.append(
            "the original gives other logits for the same tokens when others follow: it is not causal, or it changes "
            "with the length, and no cache can equal it"
        )
    tokens[0, 0] = (tokens[0, 0] + 1) % original.vocabulary
    if distance(whole[:, 1:], original.logits(tokens)[:, 1:], scale) <= allowed:
        notes.append("the original's logits hardly depend on earlier tokens: a wrong cache might not be seen")
    return wobble, notes


def _prefix(original: Original, tokens: Tokens, length: int) -> Array:
    """Return the logits of the first tokens: alone, or followed by others where the length is fixed."""
    if original.decoder.length is None:
        return original.logits(tokens[:, :length])
    others = tokens.copy()
    others[:, length:] = (others[:, length:] + 1) % original.vocabulary
    return original.logits(others)[:, :length]


def _failure(run: Callable[[], object]) -> RunError | None:
    try:
        run()
    except RunError as error:
        return error
    return None
