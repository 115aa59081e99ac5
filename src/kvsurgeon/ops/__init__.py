"""The operator table: what each operator does to shapes, axes and lengths."""
