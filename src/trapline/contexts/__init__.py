"""Where a trap may land: the gaps of the entry code, over all paths."""
