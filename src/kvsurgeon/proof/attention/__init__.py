"""Attention on probe inputs: its weights with masks, batches and numbers, and rows of them in long texts."""
