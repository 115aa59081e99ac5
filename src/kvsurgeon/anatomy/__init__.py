"""What is in a model: its attention layers, and what was established about them."""

from kvsurgeon.anatomy.facts import Attention, Cut, Decoder, Input, Mask, Projection, Rotary
from kvsurgeon.anatomy.find import find_attention, find_decoder

__all__ = ["Attention", "Cut", "Decoder", "Input", "Mask", "Projection", "Rotary", "find_attention", "find_decoder"]
