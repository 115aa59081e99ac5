"""Doors to other graph libraries."""
