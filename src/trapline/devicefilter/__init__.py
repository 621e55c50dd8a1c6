"""Device allow lists: read, checked, and held against what a kernel would bind.

`load` reads a list, `check` says of a kernel which drivers it lets in and which bind anyway.
"""
