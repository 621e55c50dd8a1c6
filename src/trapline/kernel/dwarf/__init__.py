"""Debug information: which functions, lines and source files own an address."""
