"""Comparison of the outputs of a candidate's calls with those of the reference, for one text.

The main output of a token must be that of the whole text, at every length. Any other output must be what the reference
gives for the text so far, for which the reference is run again. Two kinds of elements are not compared: those of
further outputs that the reference itself makes of the content of masked tokens, such as raw scores of padding, and
integers that random rounding of the reference changes to the value that was found, such as the larger of two almost
equal logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from kvsurgeon.errors import RunError
from kvsurgeon.parity.arithmetic.rounding import ReferenceNoise
from kvsurgeon.parity.arithmetic.tolerance import Tolerance
from kvsurgeon.parity.chunked_run import ChunkedRun
from kvsurgeon.parity.difference import ErrorMap, Scale, agreement, error_map, scale_of, worst
from kvsurgeon.parity.reference_model import ReferenceModel
from kvsurgeon.parity.reference_outputs import ReferenceOutputs
from kvsurgeon.parity.report import Comparison
from kvsurgeon.parity.scenarios import Scenario
from kvsurgeon.runtime import AnyDecoder, Array, ValueInfo
from kvsurgeon.runtime.axes import axes_of, token_axes

Counted = npt.NDArray[np.bool_]  # [batch, sequence]: tokens that are no padding and have numbers
Variant = Literal["given", "other padding", "rounded"]

_VARIANTS: dict[Variant, int] = {"given": 1, "other padding": 3, "rounded": 24}  # runs of each
_CALLS = 2  # first calls that are always compared with the text so far


@dataclass(kw_only=True)
class ReferenceRuns:
    """Runs of the reference on variants of one text, each made once, when it is needed.

    Attributes:
        noise: The reference model, and its noise.
        whole: Outputs for the whole text.
    """

    noise: ReferenceNoise
    whole: ReferenceOutputs
    _made: dict[tuple[Variant, int, int], ReferenceOutputs | None] = field(default_factory=dict)
    _scales: dict[str, Scale] = field(default_factory=dict)

    @property
    def reference(self) -> ReferenceModel:
        """The reference model."""
        return self.noise.reference

    @property
    def takes_prefixes(self) -> bool:
        """Whether the reference can be run on the text so far."""
        return not self.whole.in_calls and self.reference.decoder.length is None

    def scale(self, output: ValueInfo) -> Scale:
        """Return the scale of errors of an output; see `scale_of`."""
        if output.name not in self._scales:
            basis = self.whole.basis(output.name)
            axes = _feature_axes(output, basis.shape, self.whole.size)
            values = basis if axes is None else self.whole.joined(output.name, axes[1])
            self._scales[output.name] = scale_of(values, axes)
        return self._scales[output.name]

    def outputs(self, variant: Variant, total: int) -> Iterator[ReferenceOutputs]:
        """Yield the outputs for the first tokens of a variant of the text; none if the reference fails."""
        for number in range(_VARIANTS[variant]):
            key = variant, number, total
            if key not in self._made:
                self._made[key] = self._run(variant, number, total)
            made = self._made[key]
            if made is not None:
                yield made

    def _run(self, variant: Variant, number: int, total: int) -> ReferenceOutputs | None:
        scenario = self.whole.scenario
        if variant == "given" and total == scenario.tokens.shape[1]:
            return self.whole
        scenario, model = scenario.start(total), self.noise.rounded if variant == "rounded" else self.reference
        if variant == "other padding":
            others = (scenario.tokens + number + 1) % self.reference.vocabulary
            scenario = replace(scenario, tokens=np.where(scenario.mask, scenario.tokens, others))
        try:
            if model is None:
                return None
            return replace(model.run(scenario, in_calls=self.whole.in_calls), whole=self.whole)
        except RunError:
            return None


@dataclass(frozen=True, kw_only=True)
class _Call:
    """An output of one call of the candidate.

    Attributes:
        number: Number of the call.
        span: Past and total length of the call.
        found: The output.
        last: Axis along which it has the last token only; None if it has all.
        texts: Numbers of tokens of the texts of which it may be a part.
    """

    number: int
    span: tuple[int, int]
    found: Array
    last: int | None
    texts: tuple[int, ...]

    def parts(self, name: str, runs: ReferenceRuns, variant: Variant, total: int) -> Iterator[Array]:
        """Yield what the output must equal, for each run of a variant in which it has this shape."""
        for outputs in runs.outputs(variant, total):
            part = outputs.part(name, self.number, self.found.shape, self.span, self.last)
            if part is not None:
                yield part


@dataclass(frozen=True, kw_only=True)
class _ComparedElements:
    """An output of one call, and what it must equal.

    Attributes:
        expected: The part of the reference's output.
        found: The output.
        tokens: Tokens that count, `[batch, sequence]`.
        axes: Batch and sequence axis; None if the output is not one of tokens.
        scale: Divisor of differences.
        first: The first token.
        text: Number of tokens of the text that it is a part of.
    """

    expected: Array
    found: Array
    tokens: Counted
    axes: tuple[int, int] | None
    scale: Scale
    first: int
    text: int

    @cached_property
    def errors(self) -> ErrorMap:
        """Error of each token; one number if the output is not one of tokens."""
        if self.axes is None:
            flat = (array.reshape(1, 1, -1) for array in (self.expected, self.found))
            return error_map(*flat, batch=0, sequence=1, scale=float(np.max(self.scale)))
        batch, sequence = self.axes
        return error_map(self.expected, self.found, batch=batch, sequence=sequence, scale=self.scale)

    @property
    def counted(self) -> Counted:
        """Tokens that count, in the shape of the errors."""
        return np.ones((1, 1), bool) if self.axes is None else self.tokens

    @cached_property
    def worst(self) -> tuple[float, int, int]:
        """Largest error, its row and its token."""
        return worst(self.errors, self.counted, self.first)

    def agreement(self, tie: float) -> tuple[int, int]:
        """Return the number of tokens whose most likely next token agrees, and of all; the output has three axes."""
        expected, found = (np.moveaxis(array, self.axes or (0, 1), (0, 1)) for array in (self.expected, self.found))
        return agreement(expected, found, self.tokens, tie)

    def without(self, excused: npt.NDArray[np.bool_]) -> _ComparedElements:
        """Return the elements with those that are not compared made equal."""
        return replace(self, found=np.where(excused, self.expected, self.found))


@dataclass(frozen=True, kw_only=True)
class OutputComparer:
    """A comparison of outputs on one text.

    Attributes:
        scenario: The text.
        counted: Tokens to compare.
        runs: Runs of the reference.
        candidate: The candidate model.
        tolerance: Allowed difference.
    """

    scenario: Scenario
    counted: Counted
    runs: ReferenceRuns
    candidate: AnyDecoder
    tolerance: Tolerance

    def compare(self, run: ChunkedRun) -> Comparison:
        """Return the comparison of all outputs that both models have: that of the worst, with the lowest agreement."""
        main = self.runs.reference.main
        result = Comparison.of(self.scenario, error=0.0, agreement=1.0, output=main, row=0, token=0)
        declared = {output.name: output for output in self.runs.reference.decoder.outputs}
        for output in self.candidate.outputs:
            if output.name not in self.runs.whole.names or output.dtype is None:
                continue
            found = self._output(output, _last_token_axis(output, declared[output.name]), run)
            if found.reason is not None:
                return found
            lowest = min(found.agreement or 0.0, result.agreement or 0.0)
            largest = max(result, found, key=lambda one: (one.error or 0.0, one.output == main))
            result = replace(largest, agreement=lowest)
        return replace(result, reason=_reason(result, self.tolerance))

    def _output(self, output: ValueInfo, last: int | None, run: ChunkedRun) -> Comparison:
        """Return the comparison of one output, with a reason if it is wrong already."""
        name, basis, scale = output.name, self.runs.whole.basis(output.name), self.runs.scale(output)
        logits = name == self.runs.reference.main and output.floating and basis.ndim == 3
        largest, agreed, compared = (0.0, 0, 0), 0, 0
        for call in self._calls(output, last, run):
            elements = self._elements(output, call, scale)
            if elements is None:
                reason = f"output `{name}` has shape {list(call.found.shape)}, expected a part of {list(basis.shape)}"
                return self._wrong(name, call.span[0], reason)
            largest = max(largest, elements.worst, key=lambda error: error[0])
            if logits:
                counts = elements.agreement(self.tolerance.tie * float(np.min(scale)))
            else:
                counts = int(((elements.errors == 0) & elements.counted).sum()), int(elements.counted.sum())
            agreed, compared = agreed + counts[0], compared + counts[1]
        error, row, token = largest
        fraction = agreed / compared if compared else 1.0
        if output.floating:
            fraction = fraction if logits else 1.0
            return Comparison.of(self.scenario, error=error, agreement=fraction, output=name, row=row, token=token)
        rounded = self.runs.noise.rounds and fraction >= self.tolerance.agreement and compared > len(run.spans)
        if error and not rounded:
            reason = f"`{name}` differs at {1 - fraction:.0%} of the tokens, such as row {row}, token {token}"
            return self._wrong(name, token, reason)
        return Comparison.of(self.scenario, error=0.0, agreement=fraction, output=name, row=row, token=token)

    def _calls(self, output: ValueInfo, last: int | None, run: ChunkedRun) -> Iterator[_Call]:
        """Yield an output of all calls in which it is compared."""
        name, whole, length = output.name, self.runs.whole, self.scenario.tokens.shape[1]
        follows, basis = whole.follows_calls(name), whole.basis(name)
        for number, ((past, total), outputs) in enumerate(zip(run.spans, run.outputs, strict=True)):
            texts: tuple[int, ...] = (length,)
            if total < length and self.runs.takes_prefixes and not (follows and name == self.runs.reference.main):
                texts = (total,) if number < _CALLS or not follows else (length, total)
            if not follows and total < length:  # of the last token, or of the whole text
                unmasked = self.scenario.mask[:, total - 1].all()
                if number >= _CALLS or not unmasked or not self.runs.takes_prefixes:
                    continue
            found = whole.by_rows(name, outputs[name], total - past, total)
            is_last = last is not None and found.shape[last] == 1 < min(total - past, basis.shape[last])
            yield _Call(
                number=number, span=(past, total), found=found, last=last if is_last else None, texts=texts
            )  # fmt: skip

    def _elements(self, output: ValueInfo, call: _Call, scale: Scale) -> _ComparedElements | None:
        """Return the elements of one call to compare; None if no part of the reference's output has its shape."""
        (past, total), limit = call.span, self.tolerance.bound if output.floating else 0.0
        first = past if call.last is None else total - 1
        tokens = self.counted[:, first:total]
        elements = None
        for text in call.texts:
            for part in call.parts(output.name, self.runs, "given", text):
                axes = token_axes(output, call.found.shape, (len(tokens), tokens.shape[1]))
                by_feature = scale if part.ndim == np.ndim(scale) else float(np.max(scale))
                elements = _ComparedElements(
                    expected=part, found=call.found, tokens=tokens, axes=axes, scale=by_feature, first=past, text=text
                )
                if elements.worst[0] <= limit:
                    return elements
        return None if elements is None else elements.without(self._excused(output, call, elements))

    def _excused(self, output: ValueInfo, call: _Call, elements: _ComparedElements) -> npt.NDArray[np.bool_]:
        """Return the elements that are not compared, as the reference makes them of masked tokens or of rounding."""
        excused = np.zeros(call.found.shape, bool)
        if output.name != self.runs.reference.main and not self.scenario.mask.all():
            limit = self.tolerance.bound * elements.scale if output.floating else 0
            for part in call.parts(output.name, self.runs, "other padding", elements.text):
                if output.floating:
                    with np.errstate(invalid="ignore"):
                        near = np.abs(part.astype(np.float64) - elements.expected) <= limit
                    excused |= ~(near | (part == elements.expected))
                else:
                    excused |= part != elements.expected
        for part in call.parts(output.name, self.runs, "rounded", elements.text) if not output.floating else ():
            excused |= part == call.found
            if not elements.without(excused).worst[0]:
                break
        return excused

    def _wrong(self, name: str, token: int, reason: str) -> Comparison:
        return Comparison.of(self.scenario, error=np.inf, agreement=0.0, output=name, row=0, token=token, reason=reason)


def _last_token_axis(output: ValueInfo, reference: ValueInfo) -> int | None:
    """Return the axis along which the candidate declares one element, and the reference one for each token."""
    pairs = list(zip(output.dims, reference.dims, strict=False))[1:]
    return next((axis for axis, (own, other) in enumerate(pairs, 1) if own == 1 and other != 1), None)


def _feature_axes(output: ValueInfo, shape: Sequence[int], size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the batch and the sequence axis of an output whose other axes are features."""
    axes = token_axes(output, shape, size)
    keys = {"total", "max", "past"} & set(axes_of(output))
    return axes if axes is not None and output.floating and not keys and size[1] not in shape[2:] else None


def _reason(result: Comparison, tolerance: Tolerance) -> str | None:
    """Return the reason why outputs differ too much, else None."""
    error, agreed = result.error or 0.0, result.agreement or 0.0
    if not error <= tolerance.bound:
        place = f"row {result.row}, token {result.token}"
        return f"error of `{result.output}` is {error:.2g} of its spread at {place} (bound {tolerance.bound:.2g})"
    if agreed < tolerance.agreement:
        return f"the most likely token agrees at {agreed:.0%} of the tokens ({tolerance.agreement:.0%} required)"
    return None
