"""Decoders with a wrong cache: each overrides one step of `CachedDecoder` with a common mistake.

Every one is a valid model that runs on some text. What goes wrong in one layer goes wrong in layer 1 of three.
"""

from __future__ import annotations

from collections.abc import Sequence

from decoders import CachedDecoder

LAYER = 1


class WrongAxis(CachedDecoder):
    """Past and new tokens are joined along the heads."""

    def append(self, layer: int, past: str, new: str) -> str:
        return self.graph.op("Concat", past, new, axis=1 if layer == LAYER else 2)


class NewFirst(CachedDecoder):
    """New rows are written before the past rows."""

    def append(self, layer: int, past: str, new: str) -> str:
        if layer != LAYER:
            return super().append(layer, past, new)
        return self.graph.op("Concat", new, past, axis=2)


class ForgottenOffset(CachedDecoder):
    """Positions of new tokens begin at 0 again in each call."""

    def rotary_index(self, layer: int) -> str:
        return self.range(0, self.new_length())


class ForgottenOffsetInOneLayer(CachedDecoder):
    """The same, in one layer: query and key agree with each other, and not with the past."""

    def rotary_index(self, layer: int) -> str:
        return self.range(0, self.new_length()) if layer == LAYER else super().rotary_index(layer)


class StaleRotary(CachedDecoder):
    """After the first call the rotary tables are those of position 0."""

    def rotary_index(self, layer: int) -> str:
        at_first = self.graph.op("Equal", self.past_length(), self.graph.constant(0))
        zeros = self.graph.op("Mul", super().rotary_index(layer), self.graph.constant(0))
        return self.graph.op("Where", at_first, super().rotary_index(layer), zeros)


class SwappedKeyValue(CachedDecoder):
    """Key and value change places in the presents of one layer."""

    def present(self, layer: int, key: str, value: str) -> None:
        super().present(layer, *((value, key) if layer == LAYER else (key, value)))


class SwappedLayers(CachedDecoder):
    """The presents of the last two layers change places."""

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
    """The causal mask is aligned to the first key and not to the last."""

    def causal(self, layer: int) -> str:
        if layer != LAYER:
            return super().causal(layer)
        query = self.range(0, self.new_length())
        return self.graph.op("LessOrEqual", self.row(self.key_index()), self.column(query))


class MaskDropped(CachedDecoder):
    """After the first call every key is visible, later ones included."""

    def causal(self, layer: int) -> str:
        if layer != LAYER:
            return super().causal(layer)
        decoding = self.graph.op("Greater", self.past_length(), self.graph.constant(0))
        return self.graph.op("Or", super().causal(layer), decoding)


class LayerWithoutCache(CachedDecoder):
    """One layer has no past: it sees the new tokens only."""

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
    """The sliding window sees one key too many."""

    def width(self, layer: int) -> int:
        return super().width(layer) + 1


class PaddingIgnored(CachedDecoder):
    """Padding is visible like any token."""

    def padding(self) -> str:
        return self.graph.op("Add", "attention_mask", self.graph.constant(1))


class PaddingForgotten(CachedDecoder):
    """Padding in the past is visible; padding among the new tokens is not."""

    def padding(self) -> str:
        past = self.graph.op("Less", self.row(self.key_index()), self.past_length())
        return self.graph.op("Where", past, self.graph.constant(1), "attention_mask")


class PastTiled(CachedDecoder):
    """Heads are repeated in the wrong order once there is a past: a b a b, where groups are a a b b."""

    def repeat(self, layer: int, heads: str) -> str:
        right = super().repeat(layer, heads)
        if layer != LAYER:
            return right
        tiled = self.graph.op("Tile", heads, self.graph.constant([1, self.config.heads // self.config.kv_heads, 1, 1]))
        decoding = self.graph.op("Greater", self.past_length(), self.graph.constant(0))
        return self.graph.op("Where", decoding, tiled, right)


class WithoutNewest(CachedDecoder):
    """The presents of one layer lack the newest token."""

    def present(self, layer: int, key: str, value: str) -> None:
        if layer == LAYER:
            bounds = [self.graph.constant([number]) for number in (0, -1, 2)]
            key, value = (self.graph.op("Slice", present, *bounds) for present in (key, value))
        super().present(layer, key, value)


class ScaleForgotten(CachedDecoder):
    """Scores are scaled in the first call only."""

    def scale(self, layer: int) -> str:
        if layer != LAYER:
            return super().scale(layer)
        decoding = self.graph.op("Greater", self.past_length(), self.graph.constant(0))
        return self.graph.op("Where", decoding, self.number(1.0), super().scale(layer))


class RotatedTwice(CachedDecoder):
    """The key is kept as it enters the score product, and the past is rotated once more by the next call."""

    def append(self, layer: int, past: str, new: str) -> str:
        if layer != LAYER or not past.endswith("key"):
            return super().append(layer, past, new)
        first = self.graph.op("Slice", past, *(self.graph.constant([number]) for number in (0, 4, 3)))
        rest = self.graph.op("Slice", past, *(self.graph.constant([number]) for number in (4, 8, 3)))
        rotated_half = self.graph.op("Concat", self.graph.op("Neg", rest), first, axis=3)
        return super().append(layer, rotated_half, new)


class RowsMixed(CachedDecoder):
    """Every row of a batch is given the past of the first."""

    def append(self, layer: int, past: str, new: str) -> str:
        if layer == LAYER:
            first = self.graph.op("Gather", past, self.graph.constant([0]), axis=0)
            past = self.graph.op("Expand", first, self.graph.op("Shape", past))
        return super().append(layer, past, new)


class ForgetsFarPast(CachedDecoder):
    """A layer without a window is given one, wider than most texts."""

    def causal(self, layer: int) -> str:
        visible = super().causal(layer)
        if layer != LAYER + 1:
            return visible
        first = self.graph.op("Sub", self.column(self.query_index()), self.graph.constant(40))
        return self.graph.op("And", visible, self.graph.op("Greater", self.row(self.key_index()), first))


class WrongAtOnce(CachedDecoder):
    """Every layer is given the window, in the first call too."""

    def visible(self, layer: int) -> str:
        return self.graph.op("And", super().visible(layer), self.within(layer))


class LastLayerUncausal(CachedDecoder):
    """The mistake of `MaskDropped` in the last layer, behind which there is no cache to show it."""

    def causal(self, layer: int) -> str:
        if layer != self.config.layers - 1:
            return super().causal(layer)
        decoding = self.graph.op("Greater", self.past_length(), self.graph.constant(0))
        return self.graph.op("Or", super().causal(layer), decoding)


class ShiftedAtTheDoor(CachedDecoder):
    """Embeddings differ after the first call, as with learned positions that start again at 0."""

    def norm(self, hidden: str) -> str:
        if hidden.startswith("cached/model.Gather"):
            decoding = self.graph.op("Greater", self.past_length(), self.graph.constant(0))
            shift = self.graph.op("Where", decoding, self.number(0.5), self.number(0.0))
            hidden = self.graph.op("Add", hidden, shift)
        return super().norm(hidden)


class NotANumber(CachedDecoder):
    """Scores become infinite once there is a past."""

    def scale(self, layer: int) -> str:
        if layer != LAYER:
            return super().scale(layer)
        decoding = self.graph.op("Greater", self.past_length(), self.graph.constant(0))
        return self.graph.op("Where", decoding, self.number(float("inf")), super().scale(layer))


class OrderOfOutputs(CachedDecoder):
    """All is right, but key and value of one layer are listed in another order than their pasts."""

    def model(self):
        model = super().model()
        outputs = list(model.graph.output)
        place = 1 + 2 * LAYER
        outputs[place], outputs[place + 1] = outputs[place + 1], outputs[place]
        del model.graph.output[:]
        model.graph.output.extend(outputs)
        return model
