"""Instruction forms that a guest's #VE handler takes upon itself, held against the processor.

`forms` makes instructions, `operands` the register state around them, `stage` runs each twice
on the real kernel: natively on plain memory, and as an access that traps. `judge` compares,
`causes` says what the failing cases have in common, `campaign` does it for all of them.
"""
