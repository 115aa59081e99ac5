"""Context computed by the caller: which values become inputs, and how the caller computes them."""
