"""From what a user calls a kernel to its files: folders, packages, distributions."""
