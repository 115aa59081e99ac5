"""Context computed by the application: which values become inputs, and how the application computes them."""
