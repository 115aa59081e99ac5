"""Decoders of any size, written as exporters write them, and what working on them costs."""
