"""What is in a model: its attention layers, and what was established about them."""

from kvsurgeon.anatomy.facts import Attention, Cut, Decoder, Input, Mask, Projection, Rotary

__all__ = ["Attention", "Cut", "Decoder", "Input", "Mask", "Projection", "Rotary", "find_attention", "find_decoder"]


def find_decoder(model):  # placeholder until sequence/ lands
    raise NotImplementedError


def find_attention(model):
    return find_decoder(model).attentions
