"""What is in a model: its attention layers, and what was established about them."""

from kvsurgeon.anatomy.facts import Attention, CachedTensor, Cut, Decoder, Input, Mask, Projection, Rotary
from kvsurgeon.anatomy.find import find_decoder

__all__ = ["Attention", "CachedTensor", "Cut", "Decoder", "Input", "Mask", "Projection", "Rotary", "find_decoder"]
