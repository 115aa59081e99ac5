"""Pipelines of passes: run, verified, saved, and written for a target."""
