"""ELF files that nobody vouches for: sections, symbols, relocations, boot images."""
