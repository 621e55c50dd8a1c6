"""One run of a guest: what to boot, the run, its accounting, its policies, its trace."""
