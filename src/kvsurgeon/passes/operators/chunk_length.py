"""Change the number of tokens of a chunk in linear recurrences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.regions.recurrence import chunk_lengths
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.analysis.token_flow import SequenceState
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.options import check_count

_MAX_ELEMENTS = 1 << 18  # of a constant with a row for each token of a chunk
Lengths = Mapping[str | None, Sequence[int]]  # of texts to run, by the name of the result of a recurrence
_CLOSE = 1e-3  # largest difference of a result, as a part of its spread: sums in another order


@dataclass(frozen=True, kw_only=True)
class ChunkLength:
    """Change the number of tokens of a chunk in linear recurrences, as of Mamba-2.

    Before: a recurrence that pads a call to whole chunks of 256 tokens, so a step of one token computes 256. After:
    the same over chunks of `tokens`: few make a decode step faster, and prompts in long calls slower. Run it before
    `inject`. Results are compared on probe inputs.

    Not handled: a recurrence of which another size is the same number as its chunks.

    Attributes:
        tokens: Tokens of a chunk, at least two.
    """

    name: ClassVar[str] = "chunk-length"

    tokens: int

    def __post_init__(self) -> None:
        check_count("tokens", self.tokens, least=2)

    def apply(self, subject: Subject) -> Outcome:
        """Change the chunks of `subject.model`.

        Raises:
            UnsupportedError: The model is not a decoder without a cache, or its results would differ; it is unchanged.
        """
        work = subject.with_model(copy_model(subject.model))
        with deep_recursion():
            analysis = work.analysis()
            states = [one for one, _ in analysis.flow.recurrences if (_chunk(analysis, one) or 0) > self.tokens]
            if not states:
                return Unchanged(reason=f"the model has no recurrence over chunks of more than {self.tokens} tokens")
            lengths = {state.result.name: self._lengths(analysis, state) for state in states}
            expected = {state.result.name: _results(analysis, state, lengths) for state in states}
            edits = sum(_Shortening(analysis, state, self.tokens).apply() for state in states)
            work.model = analysis.model
            work.changed()
            found = _results_again(work, lengths)
        for name, results in expected.items():
            if not _are_near(results, found.get(name, [])):
                raise UnsupportedError(
                    "a recurrence cannot be divided into chunks of another length", code=Code.PASS_PRECONDITION,
                    at=name, expected="the results of the longer chunks", found="others",
                    hint="another size in the recurrence may be the same number",
                )  # fmt: skip
        subject.become(work)
        return Changed(edits=edits)

    def _lengths(self, analysis: Analysis, state: SequenceState) -> list[int]:
        """Return lengths of texts around the ends of the chunks."""
        chunk = _chunk(analysis, state) or 1
        ends = (size + offset for size in (self.tokens, chunk) for offset in (-1, 0, 1))
        return sorted({2, *(end for end in ends if end > 1), 2 * chunk + 3})


def _results_again(subject: Subject, lengths: Lengths) -> dict[str | None, list[np.ndarray]]:
    """Return the results of the recurrences of a model that was edited; of none if it has none any more."""
    try:
        analysis = subject.analysis()
        states = [state for state, _ in analysis.flow.recurrences if state.result.name in lengths]
        return {state.result.name: _results(analysis, state, lengths) for state in states}
    except UnsupportedError:
        return {}


def _chunk(analysis: Analysis, state: SequenceState) -> int | None:
    """Return the number of tokens of a chunk; None if there are several."""
    found = chunk_lengths(analysis.flow, state)
    return next(iter(found)) if len(found) == 1 else None


def _results(analysis: Analysis, state: SequenceState, lengths: Lengths) -> list[np.ndarray]:
    """Return the results of a recurrence for probe inputs of some lengths, from a state of zeros."""
    sources = list(dict.fromkeys(node.inputs[index] for node, index in state.places))
    runner = SubgraphRunner(analysis.flow, [state.result], probed=[value for value in sources if value is not None])
    return [runner.run(length, tokens=np.arange(length), scale=0.25)[0] for length in lengths[state.result.name]]


def _are_near(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> bool:
    return len(expected) == len(found) and all(
        one.shape == other.shape and bool(np.abs(one - other).max() <= _CLOSE * np.ptp(one))
        for one, other in zip(expected, found, strict=True)
    )


class _Shortening:
    """Replaces the number of tokens of a chunk in the constants and the context that a recurrence reads."""

    def __init__(self, analysis: Analysis, state: SequenceState, tokens: int) -> None:
        self.flow, self.state, self.tokens = analysis.flow, state, tokens
        self.chunk = _chunk(analysis, state)
        self.editor = Editor(analysis.model)
        self._done: dict[ir.Value, ir.Value] = {}

    def apply(self) -> int:
        """Replace what the nodes of the recurrence read, and return the number of edits."""
        for node in self.state.nodes:
            self.editor.before = node
            for index, value in enumerate(node.inputs):
                if value is not None and not is_token(self.flow, value):
                    self.editor.replace_input(node, index, self._shortened(value))
            for value in node.outputs:
                value.shape = None if value is not self.state.result else value.shape
        self.editor.finish()
        return self.editor.edits

    def _shortened(self, value: ir.Value) -> ir.Value:
        if value not in self._done:
            self._done[value] = self._computed(value)
        return self._done[value]

    def _computed(self, value: ir.Value) -> ir.Value:
        tensor, node = constant_tensor(value), value.producer()
        if tensor is not None:
            return self._constant(value, tensor)
        if node is None or is_token(self.flow, value):
            return value
        inputs = [one if one is None else self._shortened(one) for one in node.inputs]
        if all(one is other for one, other in zip(inputs, node.inputs, strict=True)):
            return value
        return self.editor.copy(node, inputs, "chunk").outputs[node.outputs.index(value)]

    def _constant(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        """Return a constant with the other number of tokens: an integer, or the size of an axis."""
        if tensor.size > _MAX_ELEMENTS or not (tensor.dtype.is_integer() or self.chunk in tensor.shape.numpy()):
            return value
        array = tensor.numpy()
        if array.ndim < 2 and array.dtype.kind == "i" and not np.array_equal(array, np.arange(self.chunk or 0)):
            shorter = np.where(array == self.chunk, self.tokens, array).astype(array.dtype)  # sizes
        else:  # a row for each token
            shorter = array[tuple(slice(self.tokens if size == self.chunk else None) for size in array.shape)]
        if np.array_equal(shorter, array):
            return value
        return self.editor.constant(shorter, array.dtype, name=f"{value.name}.chunk")
