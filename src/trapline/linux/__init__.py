"""Everything that is Linux's own: names of accessors, subsystems, what its #VE handler emulates."""
