"""A gate for CI: what of a kernel fails, held against a baseline and labels."""
