"""Write small decoders whose outputs change with the total length or later tokens; judge what `inject` does."""
