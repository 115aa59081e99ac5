"""Symbolic dimensions, and what is known of a tensor before the model runs."""
