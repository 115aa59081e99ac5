"""The two lengths in the graph: cache inputs and outputs, context slices and cache modes."""
