"""A kernel that runs: its modules, devices, addresses and stacks, read from its memory."""
