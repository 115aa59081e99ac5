"""Passes that make dynamic shapes static."""
