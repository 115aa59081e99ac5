"""The packages here are installed by tests, and not collected as tests."""

collect_ignore = ["sample", "troubled", "clashing"]
