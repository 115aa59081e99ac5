"""Accuracy loss of a model that was changed on purpose: KL divergence and perplexity on a text, in onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvsurgeon.errors import ParityError, UsageError
from kvsurgeon.parity.arithmetic.tolerance import ROUNDINGS, TOLERANCES, arithmetic_of
from kvsurgeon.parity.difference import distance, spread
from kvsurgeon.parity.model_source import load_graph
from kvsurgeon.parity.prediction import check_cache, longest_text, open_decoder, predict, vocabulary_size
from kvsurgeon.parity.report import Progress
from kvsurgeon.runtime import AnyDecoder, Array, Source, Tokens
from kvsurgeon.runtime.shared_inputs import share_inputs
from kvsurgeon.runtime.text import halves, load_tokenizer, read_text, side_folders

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SAMPLE = Path(__file__).parents[1] / "demo" / "model" / "sample.txt"  # the opening of a chapter, in the public domain
WINDOW, WINDOWS = 128, 4  # tokens of a call, and calls, on the sample
TEXT_WINDOW, TEXT_WINDOWS = 512, 8  # the same, on a given text
_POSITIONS = 16  # whose probabilities are computed at a time: a vocabulary may have 256,000 tokens


@dataclass(frozen=True, kw_only=True)
class AccuracyLoss:
    """The accuracy loss of a candidate model.

    Attributes:
        text: Name of the text.
        tokens: Number of predicted tokens.
        kl_divergence: Mean KL divergence of the candidate from the reference, in nats per token.
        agreement: Fraction of the tokens whose most likely next token agrees.
        reference_perplexity: Perplexity of the reference model.
        candidate_perplexity: Perplexity of the candidate model.
        layer_errors: Error of each attention output, if measured: the norm of the difference divided by the norm of the
            reference's; it includes the errors of earlier layers.
    """

    text: str
    tokens: int
    kl_divergence: float
    agreement: float
    reference_perplexity: float
    candidate_perplexity: float
    layer_errors: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


def measure_loss(
    reference: Source,
    candidate: Source,
    *,
    text: str | Path | None = None,
    held_out: bool = False,
    layers: Sequence[tuple[str, str]] = (),
    folder: str | Path | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> AccuracyLoss:
    """Measure the accuracy loss of a candidate model on a text.

    A candidate with a cache runs the first window once more, in two calls, and must give the same logits.

    Args:
        reference: The model before the change.
        candidate: The model after it.
        text: A text file; None for the bundled sample. Without a tokenizer next to the reference, random token IDs are
            used.
        held_out: Whether to measure on the second half of the text alone, because the candidate was calibrated on the
            first.
        layers: Names of the output of each attention layer in both graphs, to compare these too.
        folder: Folder of the weights and side files of models in memory.
        threads: Number of threads per operator.
        seed: Random seed of token IDs.
        progress: Called before each window.

    Raises:
        InputError: A model or the text cannot be read.
        RunError: A model cannot be run.
        ParityError: The candidate's logits differ if its cache is used, or are not numbers.
    """
    names = [name for name, _ in layers], [name for _, name in layers]
    before = open_decoder(reference, "the reference model", names[0], folder, threads)
    after = open_decoder(candidate, "the candidate model", names[1], folder, threads)
    share_inputs([before, after])
    tokenizer = load_tokenizer(side_folders(reference, folder))
    name, windows = _windows(tokenizer, text, before, after, seed, held_out=held_out)
    sums = np.zeros(5 + 2 * len(layers))
    for number, window in enumerate(windows):
        if progress is not None:
            progress(number, len(windows), f"accuracy loss on {name}")
        expected, found = predict(before, window[:, :-1], names[0]), predict(after, window[:, :-1], names[1])
        if number == 0:
            arithmetic = arithmetic_of(load_graph(candidate))
            bound = TOLERANCES[arithmetic].bound
            if arithmetic == "dynamic":
                bound = max(bound, ROUNDINGS * _range_noise(before, window[:, :-1], expected["logits"]))
            check_cache(after, window[:, :-1], found["logits"], bound)
        logits = _logit_sums(window, expected["logits"], found["logits"])
        sums += np.concatenate([logits, _layer_sums(layers, expected, found)])
    tokens, divergence, agreed, *entropies = sums[:5] / [1, *[max(sums[0], 1)] * 4]
    perplexities = [math.exp(min(nats, 700.0)) for nats in entropies]
    return AccuracyLoss(
        text=name,
        tokens=int(tokens),
        kl_divergence=max(float(divergence), 0.0),  # rounding may make it negative
        agreement=float(agreed),
        reference_perplexity=perplexities[0],
        candidate_perplexity=perplexities[1],
        layer_errors=tuple(
            math.sqrt(difference / whole) if whole else 0.0 for difference, whole in sums[5:].reshape(-1, 2)
        ),
    )


def _range_noise(reference: AnyDecoder, tokens: Tokens, logits: Array) -> float:
    """Return the error of the first half of a text if no tokens follow, by ranges over the tokens of a call."""
    half = tokens[:, : tokens.shape[1] // 2]
    first = logits[:, : half.shape[1]]
    return distance(first, predict(reference, half)["logits"], spread(first)) if logits.shape[1] > 1 else 0.0


def _logit_sums(window: Tokens, expected: Array, found: Array) -> npt.NDArray[np.float64]:
    """Return sums over the tokens of a window: count, KL divergence, agreement, cross entropy of both models."""
    if expected.shape != found.shape:
        raise ParityError(f"expected logits {list(expected.shape)} as in the reference, found {list(found.shape)}")
    expected, found = (logits.reshape(-1, logits.shape[-1]) for logits in (expected, found))
    targets = window[0, -len(expected) :]  # logits of the last token only predict the last token
    sums = np.zeros(5)
    for start in range(0, len(expected), _POSITIONS):
        part = slice(start, start + _POSITIONS)
        old, new, target = _log_softmax(expected[part]), _log_softmax(found[part]), targets[part]
        places = np.arange(len(target))
        sums += (
            len(target),
            np.sum(np.exp(old) * (old - new)),
            np.sum(old.argmax(axis=-1) == new.argmax(axis=-1)),
            -old[places, target].sum(),
            -new[places, target].sum(),
        )
    return sums


def _layer_sums(
    layers: Sequence[tuple[str, str]], expected: Mapping[str, Array], found: Mapping[str, Array]
) -> npt.NDArray[np.float64]:
    """Return for each layer the sum of squared differences, and that of the squares of the reference's values."""
    sums = np.zeros((len(layers), 2))
    for layer, names in enumerate(layers):
        old, new = expected[names[0]].astype(np.float64), found[names[1]].astype(np.float64)
        if old.size != new.size:
            raise ParityError(f"expected {list(old.shape)} in `{names[1]}` as in `{names[0]}`, found {list(new.shape)}")
        sums[layer] = np.sum((old.reshape(-1) - new.reshape(-1)) ** 2), np.sum(old**2)
    return sums.reshape(-1)


def _log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    shifted = np.clip(logits.astype(np.float64), -1e9, None)  # a padded vocabulary may end in minus infinity
    shifted -= shifted.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _windows(
    tokenizer: Tokenizer | None, text: str | Path | None, before: AnyDecoder, after: AnyDecoder, seed: int, *,
    held_out: bool,
) -> tuple[str, list[Tokens]]:  # fmt: skip
    """Return the name of a text and windows of it, each a row with one token more than the models are given."""
    if before.inputs.tokens.kind != "tokens":
        raise UsageError(f"expected an input of token ids, found `{before.inputs.tokens.name}` only")
    longest, count = (WINDOW, WINDOWS) if text is None else (TEXT_WINDOW, TEXT_WINDOWS)
    if tokenizer is None and text is None:
        length = before.length or longest_text(after, longest_text(before, longest))
        rows = np.random.default_rng(seed).integers(0, vocabulary_size(before, length), (count, length + 1))
        return "random token IDs", [row[None] for row in rows]
    path = SAMPLE if text is None else Path(text)
    ids: Sequence[int] = read_text(path, tokenizer)
    if held_out:
        _, ids = halves(ids)
    length = before.length or longest_text(after, longest_text(before, longest, ids), ids)
    size = min(length, len(ids) - 1)
    if size < 2 or (before.length and size < length):
        raise UsageError(f"expected a text of more than {max(before.length or 2, 2)} tokens, found {len(ids)}")
    starts = range(0, len(ids) - size, size)[:count]
    part = "the second half of " if held_out else ""
    name = "the bundled sample" if text is None else f"{part}{path.name}"
    return name, [np.array([ids[start : start + size + 1]], np.int64) for start in starts]
