"""x86-64 instructions that trap: classes, operands, and what Linux's #VE decoder accepts."""
