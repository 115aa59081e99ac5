"""How much of what a model computed is lost in one that was changed on purpose: measured on a text, in onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvsurgeon.errors import InputError, ParityError, UsageError
from kvsurgeon.parity.predictor import Predictor
from kvsurgeon.parity.tolerance import TOLERANCES, arithmetic_of, load_graph
from kvsurgeon.runtime import Array, Source, Tokens
from kvsurgeon.runtime.text import load_tokenizer, side_folders

Progress = Callable[[int, int, str], None]  # texts done, texts in all, name of the next

SHIPPED = Path(__file__).parents[1] / "demo" / "model" / "sample.txt"  # a chapter's opening, in the public domain
WINDOW = 128  # tokens that are predicted in one call
WINDOWS = 4
_SEEDED = "seeded token ids"
_ROWS = 16  # positions whose probabilities are computed at a time: a vocabulary may have 256,000 entries


@dataclass(frozen=True, kw_only=True)
class LayerLoss:
    """How far the output of one attention layer is from what it was.

    Attributes:
        layer: Its index.
        error: Length of the difference over the length of what was expected, over all tokens; what earlier layers lost
            is in it.
    """

    layer: int
    error: float


@dataclass(frozen=True, kw_only=True)
class Loss:
    """How much was lost.

    Attributes:
        text: Where the tokens come from.
        tokens: How many were predicted.
        divergence: Mean Kullback-Leibler divergence of the new prediction from the old, in nats for each token.
        agreement: Part of the tokens at which the likeliest next one is the same.
        perplexity_before: Of the original, on the text.
        perplexity_after: Of the result.
        layers: Of each attention layer, where asked for.
    """

    text: str
    tokens: int
    divergence: float
    agreement: float
    perplexity_before: float
    perplexity_after: float
    layers: tuple[LayerLoss, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Return all of it in types that JSON knows."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}


def measure_loss(
    original: Source,
    result: Source,
    *,
    text: str | Path | None = None,
    layers: Sequence[tuple[str, str]] = (),
    folder: str | Path | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Loss:
    """Give both models the same text, and say how far the second's predictions are from the first's.

    A result with a cache is given the first stretch once more, in two calls, and must say the same.

    Args:
        original: The model as it was.
        result: The model as it is now.
        text: A file of text. None takes the one that ships. Without a tokenizer beside the original, neither is used,
            but random token ids.
        layers: Names of the values in which both hold the output of each attention layer, to be compared too.
        folder: Where weights and side files of models in memory lie.
        threads: Threads that onnxruntime may use for one operator.
        seed: Where random token ids come from.
        progress: Told before each stretch of text.

    Raises:
        InputError: A model or the text cannot be read.
        RunError: A model cannot be run.
        ParityError: The result gives something else when its cache is used, or no numbers.
    """
    before = Predictor(original, "the original", [name for name, _ in layers], folder, threads)
    after = Predictor(result, "the result", [name for _, name in layers], folder, threads)
    name, tokens = _tokens(original, folder, text, before, after, seed)
    allowed = TOLERANCES[arithmetic_of(load_graph(result))].error
    sums = _Sums(len(layers))
    for number, window in enumerate(tokens):
        if progress is not None:
            progress(number, len(tokens), f"what was lost on {name}")
        expected, found = before.predict(window[:, :-1]), after.predict(window[:, :-1])
        if number == 0:
            after.check_cache(window[:, :-1], found, allowed)
        sums.add(window, expected, found, layers)
    return sums.loss(name)


class _Sums:
    """What adds up over the stretches of a text."""

    def __init__(self, layers: int) -> None:
        self._tokens = self._agreed = 0
        self._divergence = self._before = self._after = 0.0
        self._layers = np.zeros((layers, 2))  # squares of the difference, and of what was expected

    def add(
        self,
        window: Tokens,
        expected: Mapping[str, Array],
        found: Mapping[str, Array],
        layers: Sequence[tuple[str, str]],
    ) -> None:
        for old, new, target in _rows(window, expected["logits"], found["logits"]):
            places = np.arange(len(target))
            divergence = np.sum(np.exp(old) * (old - new), axis=-1)
            self._divergence += float(divergence.sum())
            self._before -= float(old[places, target].sum())
            self._after -= float(new[places, target].sum())
            self._agreed += int((old.argmax(axis=-1) == new.argmax(axis=-1)).sum())
            self._tokens += len(target)
        for place, (was, now) in enumerate(layers):
            one, other = expected[was].astype(np.float64), found[now].astype(np.float64)
            if one.size != other.size:
                raise ParityError(f"expected {list(one.shape)} in `{now}` as in `{was}`, found {list(other.shape)}")
            self._layers[place] += np.sum((one.reshape(-1) - other.reshape(-1)) ** 2), np.sum(one**2)

    def loss(self, text: str) -> Loss:
        tokens = max(self._tokens, 1)
        return Loss(
            text=text,
            tokens=self._tokens,
            divergence=max(self._divergence / tokens, 0.0),  # rounding may leave it below
            agreement=self._agreed / tokens,
            perplexity_before=_perplexity(self._before / tokens),
            perplexity_after=_perplexity(self._after / tokens),
            layers=tuple(
                LayerLoss(layer=layer, error=math.sqrt(difference / whole) if whole else 0.0)
                for layer, (difference, whole) in enumerate(self._layers)
            ),
        )


def _rows(
    window: Tokens, expected: Array, found: Array
) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], Tokens]]:
    """Yield the log-probabilities of both models and the tokens that came, some positions at a time."""
    if expected.shape != found.shape:
        raise ParityError(f"expected logits {list(expected.shape)} as before, found {list(found.shape)}")
    expected, found = (logits.reshape(-1, logits.shape[-1]) for logits in (expected, found))
    targets = window[0, -len(expected) :]  # logits of the last token alone predict the last one alone
    for start in range(0, len(expected), _ROWS):
        part = slice(start, start + _ROWS)
        yield _log_probabilities(expected[part]), _log_probabilities(found[part]), targets[part]


def _log_probabilities(logits: Array) -> npt.NDArray[np.float64]:
    shifted = np.clip(logits.astype(np.float64), -1e9, None)  # a padded vocabulary may end in minus infinity
    shifted -= shifted.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _perplexity(nats: float) -> float:
    return math.exp(min(nats, 700.0))


def _tokens(
    original: Source,
    folder: str | Path | None,
    text: str | Path | None,
    predictor: Predictor,
    other: Predictor,
    seed: int,
) -> tuple[str, list[Tokens]]:
    """Return where the text comes from, and stretches of it, each a row with one token more than is given."""
    if predictor.decoder.inputs.tokens.kind != "tokens":
        raise UsageError(f"expected an input of token ids, found `{predictor.decoder.inputs.tokens.name}` only")
    length = predictor.length or other.longest(predictor.longest(WINDOW))
    tokenizer = load_tokenizer(side_folders(original, folder))
    if tokenizer is None:
        if text is not None:
            raise UsageError("expected tokenizer.json beside the original to read a text with, found none")
        rows = np.random.default_rng(seed).integers(0, predictor.vocabulary(length), (WINDOWS, length + 1))
        return _SEEDED, [row[None] for row in rows]
    path = SHIPPED if text is None else Path(text)
    try:
        ids = tokenizer.encode(path.read_text("utf-8")).ids
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot read the text `{path}`: {said}") from error
    size = min(length, len(ids) - 1)
    if size < 2 or (predictor.length and size < length):
        raise UsageError(f"expected a text of more than {max(predictor.length or 2, 2)} tokens, found {len(ids)}")
    starts = range(0, len(ids) - size, size)[:WINDOWS]
    name = "the text that ships" if text is None else path.name
    return name, [np.array([ids[start : start + size + 1]], np.int64) for start in starts]
