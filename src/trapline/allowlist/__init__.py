"""Device allow lists: which devices a confidential guest lets its drivers bind to."""
