"""The CPU engine as an interface, and the one on Unicorn."""
