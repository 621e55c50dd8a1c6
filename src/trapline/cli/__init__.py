"""The commands: one file each, which parses, calls the layer below and prints; no logic."""
