"""The cache that a graph already has: which inputs and outputs it consists of, and where its length is given."""
