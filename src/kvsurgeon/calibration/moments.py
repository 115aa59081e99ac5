"""Statistics of activations that are accumulated row by row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvsurgeon.errors import RunError

Matrix = npt.NDArray[np.float64]


class SecondMoment:
    """The second moment of features, `sum over tokens of x^T x`, in double precision.

    Attributes:
        total: The sum, `[features, features]`.
        tokens: Number of tokens.
    """

    def __init__(self, features: int) -> None:
        self.total: Matrix = np.zeros((features, features))
        self.tokens = 0

    def add(self, rows: npt.NDArray[np.floating]) -> None:
        """Add the features of some tokens, `[tokens, features]`."""
        exact = rows.astype(np.float64)
        with np.errstate(all="ignore"):
            self.total += exact.T @ exact
        self.tokens += len(rows)

    def check(self, name: str) -> None:
        """Check that the features were numbers.

        Raises:
            RunError: They were not.
        """
        if not np.isfinite(self.total).all():
            raise RunError(f"expected numbers when the model is run on the text, found infinity or NaN - at `{name}`")
