"""A compiled kernel as an object: images, sections, symbols, inlines, types, modules."""
