"""Context given by the host: which values that is, and what the host must know to make them."""
