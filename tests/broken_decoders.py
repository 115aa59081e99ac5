"""Wrong injections: each overrides a step of `CachedDecoder` with a common mistake.

Each is a valid model that runs on some text. A mistake in one layer is in layer 1 of three.
"""

from __future__ import annotations

from collections.abc import Sequence

from decoders import CachedDecoder

LAYER = 1


class WrongAxis(CachedDecoder):
    """Concatenate past and new tokens along the heads."""

    def append(self, layer: int, past: str, new: str) -> str:
        return self.graph.op("Concat", past, new, axis=1 if layer == LAYER else 2)


class NewFirst(CachedDecoder):
    """Concatenate the new tokens before the past."""

    def append(self, layer: int, past: str, new: str) -> str:
        if layer != LAYER:
            return super().append(layer, past, new)
        return self.graph.op("Concat", new, past, axis=2)


class MissingOffset(CachedDecoder):
    """Start positions at 0 in each call."""

    def rotary_index(self, layer: int) -> str:
        return self.range(0, self.new_length())


class MissingOffsetInOneLayer(CachedDecoder):
    """Start positions at 0 in each call, in one layer."""

    def rotary_index(self, layer: int) -> str:
        return self.range(0, self.new_length()) if layer == LAYER else super().rotary_index(layer)


class StaleRotary(CachedDecoder):
    """Use the rotary tables of position 0 after the first call."""

    def rotary_index(self, layer: int) -> str:
        at_first = self.graph.op("Equal", self.past_length(), self.graph.constant(0))
        zeros = self.graph.op("Mul", super().rotary_index(layer), self.graph.constant(0))
        return self.graph.op("Where", at_first, super().rotary_index(layer), zeros)


class SwappedKeyValue(CachedDecoder):
    """Swap key and value in the presents of one layer."""

    def present(self, layer: int, key: str, value: str) -> None:
        super().present(layer, *((value, key) if layer == LAYER else (key, value)))


class SwappedLayers(CachedDecoder):
    """Swap the presents of the last two layers."""

    def present(self, layer: int, key: str, value: str) -> None:
        other = {LAYER: LAYER + 1, LAYER + 1: LAYER}.get(layer, layer)
        super().present(other, key, value)

    def model(self):
        model = super().model()
        ordered = sorted(model.graph.output[1:], key=lambda output: output.name)
        del model.graph.output[1:]
        model.graph.output.extend(ordered)
        return model


class WrongCorner(CachedDecoder):
    """Align the causal mask to the first key instead of the last."""

    def causal(self, layer: int) -> str:
        if layer != LAYER:
            return super().causal(layer)
        query = self.range(0, self.new_length())
        return self.graph.op("LessOrEqual", self.row(self.key_index()), self.column(query))


class MaskDropped(CachedDecoder):
    """Drop the causal mask if there is a past."""

    def causal(self, layer: int) -> str:
        if layer != LAYER:
            return super().causal(layer)
        decoding = self.graph.op("Greater", self.past_length(), self.graph.constant(0))
        return self.graph.op("Or", super().causal(layer), decoding)


class LayerWithoutCache(CachedDecoder):
    """Leave one layer without a past."""

    def cached_layers(self) -> Sequence[int]:
        return [layer for layer in range(self.config.layers) if layer != LAYER]

    def visible(self, layer: int) -> str:
        if layer in self.cached_layers():
            return super().visible(layer)
        index = self.range(0, self.new_length())
        distance = self.graph.op("Sub", self.column(index), self.row(index))
        causal = self.graph.op("GreaterOrEqual", distance, self.graph.constant(0))
        return self.graph.op("And", causal, self.graph.op("Less", distance, self.graph.constant(self.width(layer))))


class WindowOffByOne(CachedDecoder):
    """Widen the sliding window by one key."""

    def width(self, layer: int) -> int:
        return super().width(layer) + 1


class PaddingIgnored(CachedDecoder):
    """Ignore the padding mask."""

    def padding(self) -> str:
        return self.graph.op("Add", "attention_mask", self.graph.constant(1))


class PastPaddingIgnored(CachedDecoder):
    """Ignore the padding mask in the past."""

    def padding(self) -> str:
        past = self.graph.op("Less", self.row(self.key_index()), self.past_length())
        return self.graph.op("Where", past, self.graph.constant(1), "attention_mask")


class PastTiled(CachedDecoder):
    """Repeat heads in the wrong order if there is a past: a b a b instead of a a b b."""

    def repeat(self, layer: int, heads: str) -> str:
        right = super().repeat(layer, heads)
        if layer != LAYER:
            return right
        tiled = self.graph.op("Tile", heads, self.graph.constant([1, self.config.heads // self.config.kv_heads, 1, 1]))
        decoding = self.graph.op("Greater", self.past_length(), self.graph.constant(0))
        return self.graph.op("Where", decoding, tiled, right)


class WithoutLastToken(CachedDecoder):
    """Leave the last token out of the presents of one layer."""

    def present(self, layer: int, key: str, value: str) -> None:
        if layer == LAYER:
            bounds = [self.graph.constant([number]) for number in (0, -1, 2)]
            key, value = (self.graph.op("Slice", present, *bounds) for present in (key, value))
        super().present(layer, key, value)


class MissingScale(CachedDecoder):
    """Scale scores in the first call only."""

    def scale(self, layer: int) -> str:
        if layer != LAYER:
            return super().scale(layer)
        decoding = self.graph.op("Greater", self.past_length(), self.graph.constant(0))
        return self.graph.op("Where", decoding, self.number(1.0), super().scale(layer))


class RotatedTwice(CachedDecoder):
    """Cache rotated keys, and rotate the past again."""

    def append(self, layer: int, past: str, new: str) -> str:
        if layer != LAYER or not past.endswith("key"):
            return super().append(layer, past, new)
        first = self.graph.op("Slice", past, *(self.graph.constant([number]) for number in (0, 4, 3)))
        rest = self.graph.op("Slice", past, *(self.graph.constant([number]) for number in (4, 8, 3)))
        rotated = self.graph.op("Concat", self.graph.op("Neg", rest), first, axis=3)
        return super().append(layer, rotated, new)


class RowsMixed(CachedDecoder):
    """Use the past of the first row for all rows of a batch."""

    def append(self, layer: int, past: str, new: str) -> str:
        if layer == LAYER:
            first = self.graph.op("Gather", past, self.graph.constant([0]), axis=0)
            past = self.graph.op("Expand", first, self.graph.op("Shape", past))
        return super().append(layer, past, new)


class LostDistantPast(CachedDecoder):
    """Add a sliding window to one layer, wider than most texts."""

    def causal(self, layer: int) -> str:
        visible = super().causal(layer)
        if layer != LAYER + 1:
            return visible
        first = self.graph.op("Sub", self.column(self.query_index()), self.graph.constant(40))
        return self.graph.op("And", visible, self.graph.op("Greater", self.row(self.key_index()), first))


class WindowInAllLayers(CachedDecoder):
    """Add the sliding window to all layers."""

    def visible(self, layer: int) -> str:
        return self.graph.op("And", super().visible(layer), self.within(layer))


class LastLayerUncausal(CachedDecoder):
    """Drop the causal mask in the last layer, after which no cache shows it."""

    def causal(self, layer: int) -> str:
        if layer != self.config.layers - 1:
            return super().causal(layer)
        decoding = self.graph.op("Greater", self.past_length(), self.graph.constant(0))
        return self.graph.op("Or", super().causal(layer), decoding)


class ShiftedInput(CachedDecoder):
    """Change the input of the first layer if there is a past, as learned positions that start at 0 do."""

    def norm(self, hidden: str) -> str:
        if hidden.startswith("cached/model.Gather"):
            decoding = self.graph.op("Greater", self.past_length(), self.graph.constant(0))
            shift = self.graph.op("Where", decoding, self.number(0.5), self.number(0.0))
            hidden = self.graph.op("Add", hidden, shift)
        return super().norm(hidden)


class NotANumber(CachedDecoder):
    """Make scores infinite if there is a past."""

    def scale(self, layer: int) -> str:
        if layer != LAYER:
            return super().scale(layer)
        decoding = self.graph.op("Greater", self.past_length(), self.graph.constant(0))
        return self.graph.op("Where", decoding, self.number(float("inf")), super().scale(layer))


class OutputOrder(CachedDecoder):
    """List the presents of one layer in another order than the pasts."""

    def model(self):
        model = super().model()
        outputs = list(model.graph.output)
        place = 1 + 2 * LAYER
        outputs[place], outputs[place + 1] = outputs[place + 1], outputs[place]
        del model.graph.output[:]
        model.graph.output.extend(outputs)
        return model
