"""Heads: where in a tensor they lie, which columns of which weights make them, and how to have others."""
