"""Instruction forms that a guest's #VE handler takes upon itself, held against the processor.

`forms` makes instructions, `cases` varies them, `inputs` the register state around them. `fixture`
runs each twice on the real kernel: natively on plain memory, and as an access that traps. `judge`
and `comparison` say what differs, `causes` what the failing cases have in common, `rounds` does it
for all of them.
"""
