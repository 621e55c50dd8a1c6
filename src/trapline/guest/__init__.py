"""A frozen, running guest: what explore and verify stand on."""
