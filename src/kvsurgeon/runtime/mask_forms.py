"""The form of each mask that a reference model takes, found by running it: nothing else says what hides a token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np

from kvsurgeon.errors import RunError, UsageError
from kvsurgeon.runtime.decoder import AnyDecoder
from kvsurgeon.runtime.feeds import DecoderInputs, InputSpec, MaskForm

_LENGTH = 8  # tokens of a text
_MANY = 1 << 14  # tokens: a count that hides none
_BOUND = 1e-3  # of the spread: a smaller difference is none
_FORMS: tuple[MaskForm, ...] = ("kept", "hidden", "added")


def settle_masks(decoder: AnyDecoder, inputs: DecoderInputs) -> DecoderInputs:
    """Return the inputs with the first forms in which masks hide what they must; unchanged if there are none.

    Args:
        decoder: The reference model.
        inputs: Its inputs.
    """
    before = decoder.inputs
    try:
        for choice in _choices(inputs):
            decoder.use_inputs(choice)
            if _hides(decoder):
                return choice
        return inputs
    finally:
        decoder.use_inputs(before)


def with_forms_of(inputs: DecoderInputs, settled: DecoderInputs) -> DecoderInputs:
    """Return inputs with the masks' forms and the number of other inputs of the same name."""
    forms = {spec.name: spec.form for spec in settled.specs}
    specs = tuple(replace(spec, form=forms.get(spec.name, spec.form)) for spec in inputs.specs)
    return replace(inputs, specs=specs, number=settled.number)


def _choices(inputs: DecoderInputs) -> Iterator[DecoderInputs]:
    """Yield the inputs in all forms, the usual one first."""
    has_number = any(spec.kind == "other" and spec.tensor.integer and len(spec.axes) < 2 for spec in inputs.specs)
    for number in (inputs.number, _MANY, 1) if has_number else (inputs.number,):
        for specs in product(*map(_forms, inputs.specs)):
            yield replace(inputs, specs=specs, number=number)


def _forms(spec: InputSpec) -> tuple[InputSpec, ...]:
    if not spec.is_mask:
        return (spec,)
    return spec, *(replace(spec, form=form) for form in _FORMS if form != "added" or spec.tensor.floating)


def _hides(decoder: AnyDecoder) -> bool:
    """Return whether outputs depend on earlier tokens, on no later and on no masked ones; true if that is unknown."""
    length = decoder.length or decoder.step_length or _LENGTH
    if length < 4:
        return True
    tokens, mask = np.arange(length) % 2, np.ones(length, np.int64)
    mask[0] = 0
    late, masked, early = tokens.copy(), tokens.copy(), tokens.copy()
    late[-1], early[1] = 1 - late[-1], 1 - early[1]
    masked[0] = 1 - masked[0] if decoder.inputs.masked else masked[0]
    try:
        whole, *others = (_outputs(decoder, row, mask) for row in (tokens, late, masked, early))
    except (RunError, UsageError):
        return False
    if not whole.size:
        return False  # a number of tokens selects none
    if whole.shape[:2] == (length, decoder.batch or 1):  # tokens first
        whole, *others = (np.moveaxis(array, 0, 1) for array in (whole, *others))
    if whole.ndim < 3 or whole.shape[1] != length or whole.dtype.kind != "f":
        return True
    observed = [whole[:, 1:-1], others[0][:, 1:-1], others[1][:, 1:-1], others[2][:, -1:]]
    if not all(np.isfinite(array).all() for array in observed):
        return False
    bound = _BOUND * float(np.ptp(whole[:, 1:]))
    same = all(np.abs(observed[0] - array).max(initial=0.0) <= bound for array in observed[1:3])
    return same and float(np.abs(whole[:, -1:] - observed[3]).max(initial=0.0)) > 0


def _outputs(decoder: AnyDecoder, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    rows = decoder.batch or 1
    feeds = decoder.inputs.feeds(np.repeat(tokens[None], rows, axis=0), np.repeat(mask[None], rows, axis=0))
    return np.asarray(decoder.run(feeds)[decoder.logits])
