"""Outputs of the reference model for a text, and the part that a call of the candidate must equal."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvsurgeon.parity.difference import expected_part
from kvsurgeon.parity.scenarios import Scenario
from kvsurgeon.runtime import Array


@dataclass(frozen=True, kw_only=True)
class ReferenceOutputs:
    """Outputs of the reference model for the whole text in one call, or for each call of a scenario.

    Attributes:
        scenario: The text.
        calls: Outputs of each call.
        in_calls: Whether the reference ran in the calls of the scenario.
        whole: Outputs for the whole text if these are for its first tokens: their shapes show which axes an output has.
    """

    scenario: Scenario
    calls: tuple[Mapping[str, Array], ...]
    in_calls: bool
    whole: ReferenceOutputs | None = None

    @property
    def names(self) -> Collection[str]:
        """Names of the outputs."""
        return self.calls[0].keys()

    @property
    def size(self) -> tuple[int, int]:
        """Batch size and number of tokens of the longest call."""
        batch, length = self.scenario.tokens.shape
        return batch, max(self.scenario.chunks) if self.in_calls else length

    def basis(self, name: str) -> Array:
        """Return an output for the whole text, or for the longest call."""
        sizes = self.scenario.chunks if self.in_calls else (self.scenario.tokens.shape[1],)
        longest = max(range(len(self.calls)), key=lambda call: sizes[call])
        return self.by_rows(name, self.calls[longest][name], sizes[longest])

    def joined(self, name: str, axis: int) -> Array:
        """Return an output of all calls, joined along its axis of tokens."""
        spans = self.scenario.spans if self.in_calls else [(0, self.scenario.tokens.shape[1])]
        lengths = (total - past for past, total in spans)
        parts = [self.by_rows(name, call[name], length) for call, length in zip(self.calls, lengths, strict=True)]
        return np.concatenate(parts, axis=axis)

    def by_rows(self, name: str, array: Array, *lengths: int) -> Array:
        """Return an output with an axis for rows and one for tokens, if the model has one for both.

        Args:
            name: Name of the output.
            array: The output of a call.
            lengths: Number of tokens of that call, and of the text so far if the output may be that of all of them.
        """
        batch, flat = self.size[0], (self.whole or self)._is_flat(name)
        length = next((length for length in lengths if flat and len(array) == batch * length), None)
        return array if length is None else array.reshape(batch, length, *array.shape[1:])

    def _is_flat(self, name: str) -> bool:
        """Whether an output has one axis for rows and tokens."""
        batch, tokens = self.size
        shape = max((call[name].shape for call in self.calls), key=lambda shape: shape[:1])
        return shape[:1] == (batch * tokens,) and shape[:2] != (batch, tokens) and (len(shape) == 2 or batch > 1)

    def follows_calls(self, name: str) -> bool:
        """Whether the reference gives an output for each call, and not for the whole text only."""
        return self.in_calls or self.scenario.tokens.shape[1] in self.basis(name).shape

    def part(
        self, name: str, call: int, shape: tuple[int, ...], span: tuple[int, int], last: int | None
    ) -> Array | None:
        """Return what a call of the candidate must equal; None if no part has this shape.

        Args:
            name: Name of the output.
            call: Number of the call.
            shape: Shape of the candidate's output.
            span: Past and total length of the call.
            last: Axis along which the candidate gives the last token only.
        """
        past, total = span
        if last is not None:
            shape = (*shape[:last], total - past, *shape[last + 1 :])
        if self.in_calls:
            found = self.by_rows(name, self.calls[call][name], total - past, total)
            part = found if found.shape == shape else None
        else:
            part = expected_part(self.basis(name), shape, past, total)
        return part if part is None or last is None else part.take([-1], axis=last)

    def numbers(self, name: str) -> npt.NDArray[np.bool_]:
        """Return for which tokens an output has a number that is finite, `[batch, sequence]`."""
        tokens = self.scenario.tokens
        found = np.ones(tokens.shape, bool)
        spans = list(self.scenario.spans) if self.in_calls else [(0, tokens.shape[1])]
        for outputs, (past, total) in zip(self.calls, spans, strict=True):
            array = self.by_rows(name, outputs[name], total - past)
            finite = np.isfinite(array if array.dtype.kind in "biuf" else array.astype(np.float32))
            if array.shape[:2] == (len(tokens), total - past):
                found[:, past:total] = finite.reshape(*array.shape[:2], -1).any(axis=2)
            else:
                found[:, past:total] = finite.any()
        return found
