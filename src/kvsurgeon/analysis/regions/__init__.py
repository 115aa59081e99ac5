"""Regions that mix or reorder tokens: sequence states, and experts that select their tokens."""
