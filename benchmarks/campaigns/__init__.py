"""Run many models in separate processes, and collect the results."""
