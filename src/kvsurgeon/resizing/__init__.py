"""Stage 4: context and token data at other lengths than the export's one, as values of the graph."""
