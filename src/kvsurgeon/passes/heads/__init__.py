"""Passes that change the number of KV heads and of layers with their own KV cache."""
