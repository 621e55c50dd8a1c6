"""Labels: what people said of findings, read from a file of theirs and carried between kernels."""
