"""Models with what they answer, run by a judge that knows nothing of the surgeon, and what became of each."""
