"""Facts about every value before the model runs: its shape, its kind, and the role of each input."""
