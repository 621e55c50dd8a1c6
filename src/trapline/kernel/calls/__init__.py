"""The call graph of a compiled kernel: which function may run after which, and why.

`build.py` makes a `graph.Graph` of a vmlinux and of what modules are wanted. docs/contexts.md says
how each kind of edge is found, and what is missed.
"""
