"""Context that differs by sequence of a batch: its rows are gathered at positions or rows that each sequence has."""
