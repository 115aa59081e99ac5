"""Two lengths: where the tokens are, what must be remembered, and what can be computed anew."""
