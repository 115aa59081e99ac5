"""What is known of every value before the model runs: its shape, its kind, and the variable of each input."""
