"""Decoders whose outputs change with the total length or later tokens, and what `inject` does with them."""
