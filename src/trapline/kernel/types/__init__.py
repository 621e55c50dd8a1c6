"""The kernel's types, from BTF."""
