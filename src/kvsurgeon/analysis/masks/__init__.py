"""Masks that the caller gives: the form of each, and the attention weights that show it."""
