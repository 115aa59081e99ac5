"""Inputs of models that are compared, or of one that is measured: their kinds, axes and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

from kvsurgeon.runtime.axes import axes_of
from kvsurgeon.runtime.decoder import AnyDecoder
from kvsurgeon.runtime.feeds import InputSpec
from kvsurgeon.runtime.mask_forms import settle_masks, with_forms_of


def share_inputs(decoders: Sequence[AnyDecoder], seed: int | None = None) -> None:
    """Give the inputs of some models one kind, the axes that any of them shows, and values that all of them take.

    Args:
        decoders: The models, the reference first.
        seed: Random seed of inputs that are neither tokens, masks nor positions; None for zeros.
    """
    for decoder, other in permutations(decoders, 2):
        _merge_inputs(decoder, other)
    for by_name, values in ((True, seed), (True, None), (False, None)):
        fed = [one.inputs.fed(by_name=by_name, seed=values, capacity=one.capacity) for one in decoders]
        if all(one.takes(inputs) for one, inputs in zip(decoders, fed, strict=True)):
            settled = settle_masks(decoders[0], fed[0])
            for one, inputs in zip(decoders, fed, strict=True):
                one.use_inputs(with_forms_of(inputs, settled))
            return


def _merge_inputs(decoder: AnyDecoder, other: AnyDecoder) -> None:
    """Replace inputs by the other model's of the same name if these show more axes."""
    known = {spec.name: spec for spec in other.inputs.specs}
    cached = bool(other.cache) - bool(decoder.cache)
    specs = tuple(_merged(spec, known.get(spec.name), cached) for spec in decoder.inputs.specs)
    decoder.use_inputs(replace(decoder.inputs, specs=specs))


def _merged(own: InputSpec, other: InputSpec | None, cached: int) -> InputSpec:
    """Return an input with the other model's kind and axes; its own if a pass made another kind of input.

    Args:
        own: The input.
        other: The other model's input of the same name.
        cached: 1 if the other model alone has a cache, which shows inputs for all tokens; -1 if it alone has none.
    """
    if other is None or len(other.axes) != len(own.axes) or other.tensor.floating != own.tensor.floating:
        return own
    pairs = zip(own.tensor.dims, other.tensor.dims, own.axes, strict=True)
    sizes = tuple(size if isinstance(size, int) and axis == "fixed" else dim for dim, size, axis in pairs)
    own = replace(own, tensor=replace(own.tensor, dims=sizes))
    shows_less = cached < 0 and "total" in own.axes and "total" not in other.axes
    better = cached > 0 or (_named_axes(other) > _named_axes(own) and not shows_less)
    return replace(own, axes=other.axes, kind=other.kind) if better else own


def _named_axes(spec: InputSpec) -> int:
    return sum(axis != "fixed" for axis in axes_of(spec.tensor))
