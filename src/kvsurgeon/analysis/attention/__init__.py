"""Attention in detail: its weights as arrays, the masks that the caller gives, keys that are the same in every call."""
