"""The import path of SparseML."""
