"""Every place where a compiled kernel traps, found in the binary and attributed."""
