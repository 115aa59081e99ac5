"""Passes that replace operators by others: fusions, simpler equivalents, and constants in another range."""
