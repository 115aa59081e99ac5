"""Low-rank maps that lose least: principal components of features, weighted by how much a reader sees of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_DAMPING = 1e-9  # of the mean eigenvalue, added to weights: features that no reader sees have a finite inverse


@dataclass(frozen=True, kw_only=True)
class LowRankMap:
    """A map of features to fewer, and back.

    Attributes:
        encode: `[rank, features]`.
        decode: `[features, rank]`; `decode @ encode` is the identity on features of that rank.
        loss: The share of the weighted second moment that is lost.
    """

    encode: np.ndarray
    decode: np.ndarray
    loss: float


def low_rank_map(moment: np.ndarray, weights: Sequence[np.ndarray], rank: int) -> LowRankMap:
    """Return the map of this rank that minimizes the error of features as their readers see it.

    Args:
        moment: Second moment of the features, `sum over tokens of x x^H`, real or complex, `[features, features]`.
        weights: For each block of features, `sum over readers of r^H r`, where `r @ x` is what a reader takes of it.
        rank: Rank of the map.
    """
    roots = [_root(block) for block in weights]
    root, inverse = _block_diagonal(roots), _block_diagonal([np.linalg.inv(one) for one in roots])
    weighted = root @ moment @ root.conj().T
    values, vectors = np.linalg.eigh((weighted + weighted.conj().T) / 2)
    top = vectors[:, ::-1][:, :rank]
    encode, decode = top.conj().T @ root, inverse @ top
    scale = np.sqrt(np.mean(np.abs(decode) ** 2) * rank) or 1.0  # float16 has a small range
    total = max(float(values.sum()), 1e-300)
    lost = max(float(values[: len(values) - rank].sum()), 0.0)
    return LowRankMap(encode=encode * scale, decode=decode / scale, loss=lost / total)


def _root(block: np.ndarray) -> np.ndarray:
    """Return the symmetric square root of a positive semidefinite matrix, made invertible."""
    damped = block + np.eye(len(block)) * (_DAMPING * max(float(np.trace(block).real) / len(block), 1e-30))
    values, vectors = np.linalg.eigh((damped + damped.conj().T) / 2)
    smallest = _DAMPING * max(float(values[-1]), 1e-30)
    root: np.ndarray = (vectors * np.sqrt(np.maximum(values, smallest))) @ vectors.conj().T
    return root


def _block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    size = sum(map(len, blocks))
    whole = np.zeros((size, size), dtype=np.result_type(*blocks))
    start = 0
    for block in blocks:
        whole[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return whole
