"""Passes that add, convert and remove a KV cache."""
