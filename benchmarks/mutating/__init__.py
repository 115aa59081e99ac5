"""Graphs changed at random: in ways that a surgeon must notice, and in ways that must not matter to it."""
