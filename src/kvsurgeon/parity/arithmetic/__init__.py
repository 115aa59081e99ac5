"""How two models compute: the tolerance of their arithmetic, its rounding, and the models without this rounding."""
