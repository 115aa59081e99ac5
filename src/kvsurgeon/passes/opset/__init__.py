"""Passes that convert a model to another opset version."""
