"""The two lengths in the graph: cache inputs and outputs, cache modes, head grouping."""
