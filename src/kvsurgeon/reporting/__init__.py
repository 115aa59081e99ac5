"""Tables, plots and JSON."""
