"""Location of a fault: the layer whose attention or cache explains the differences of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from kvsurgeon.parity.report import CacheDifference
from kvsurgeon.runtime import CacheIO


def locate_fault(differences: Sequence[CacheDifference], cache: Sequence[CacheIO]) -> tuple[int, str]:
    """Return the faulty layer and the reason: no later layer can make the cache of a layer wrong.

    Args:
        differences: Cached tensors that differ, lowest layer first.
        cache: All cache inputs and outputs.
    """
    layers = sorted({entry.layer for entry in cache})
    if not differences:
        return layers[-1], f"all keys and values are correct: the fault is in attention of the last layer, {layers[-1]}"
    layer = differences[0].layer
    here = [difference for difference in differences if difference.layer == layer]
    for difference in here:
        if difference.past_changed:
            other = f", but with `{difference.starts_with}`" if difference.starts_with else ""
            return layer, f"`{difference.present}` does not start with the past of layer {layer}{other}"
    since = f"wrong from token {min(difference.first_token for difference in here)} on"
    parts = {difference.part for difference in here}
    if len(parts) == 1 and sum(entry.layer == layer for entry in cache) > 1:
        return layer, f"only the {parts.pop()} of layer {layer} is {since}: the fault is in its computation"
    if layer == layers[0]:
        return layer, f"key and value of the first layer, {layer}, are {since}: the fault is in its input"
    before = layer - 1
    name = f"layer {before}" if before in layers else f"layer {before}, which has no cache"
    return before, f"key and value of layer {layer} are {since}: the fault is in attention of {name}"
