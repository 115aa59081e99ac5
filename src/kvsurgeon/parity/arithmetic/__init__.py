"""Arithmetic of the models to compare: tolerances, noise by rounding, and the models without rounding."""
