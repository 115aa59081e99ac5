"""Choosing the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvsurgeon.errors import UsageError
from kvsurgeon.runtime.tensors import Array


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings for choosing the next token: greedy, unless a temperature is given.

    Attributes:
        temperature: Divisor of the logits; 0 is greedy.
        top_k: Number of most likely tokens to sample from.
        top_p: Cumulative probability of the most likely tokens to sample from.
        seed: Random seed; None draws a different one in each run.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"expected a temperature of 0 or more, found {self.temperature}")
        if self.temperature == 0 and (self.top_k, self.top_p) != (None, None):
            raise UsageError("expected a temperature above 0 with top_k or top_p, found 0, which is greedy")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"expected a seed of 0 or more, found {self.seed}")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"expected top_k of 1 or more, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"expected top_p above 0 and at most 1, found {self.top_p}")

    def choose(self, logits: Array, random: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return one token for each row of `[batch, vocabulary]`.

        Raises:
            UsageError: The logits have other axes, such as those of several codebooks.

        >>> Sampling().choose(np.array([[0.1, 0.7, 0.2]]), np.random.default_rng(0))
        array([1])
        """
        if logits.ndim != 2:
            raise UsageError(f"expected logits of one token for each sequence, found {list(logits.shape)}")
        logits = logits.astype(np.float64)
        if self.temperature == 0:
            return np.asarray(logits.argmax(axis=-1), np.int64)
        probabilities = self._probabilities(logits / self.temperature)
        return np.array([random.choice(len(row), p=row) for row in probabilities], np.int64)

    def _probabilities(self, logits: Array) -> Array:
        """Return the probability of each token, 0 for the tokens that `top_k` and `top_p` exclude."""
        order = np.argsort(-logits, axis=-1, kind="stable")
        ranked = np.take_along_axis(logits, order, axis=-1)
        weights = np.exp(ranked - ranked[:, :1])
        weights /= weights.sum(axis=-1, keepdims=True)
        if self.top_k is not None:
            weights[:, self.top_k :] = 0
        if self.top_p is not None:
            before = np.cumsum(weights, axis=-1) - weights
            weights[before >= self.top_p * weights.sum(axis=-1, keepdims=True)] = 0
        weights /= weights.sum(axis=-1, keepdims=True)
        unranked: Array = np.empty_like(weights)
        np.put_along_axis(unranked, order, weights, axis=-1)
        return unranked
