"""Heads: the axes that hold them, the weights that compute them, and their replacement."""
