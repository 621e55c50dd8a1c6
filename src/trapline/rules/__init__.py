"""What a TD does, as data: one table per kind and TDX module version, with sources."""
