"""Attention as one operator: what can be written so, what shows it, and how the operator's inputs are made."""
