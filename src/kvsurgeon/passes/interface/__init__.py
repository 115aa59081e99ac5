"""Passes that change the inputs and outputs of a model: names, types, dimensions, masks and positions."""
