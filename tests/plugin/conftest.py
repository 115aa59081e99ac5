"""Packages that tests install; pytest does not collect them."""

collect_ignore = ["sample", "troubled", "clashing"]
