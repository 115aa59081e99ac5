"""Passes written with other graph libraries."""
