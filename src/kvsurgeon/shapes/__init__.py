"""Dimensions and lengths, followed through a graph symbolically."""
