"""What a boot loader and a TD's firmware leave in guest memory before the kernel starts.

`place.load` puts everything together: memory map, boot parameters, ACPI tables, kernel,
initramfs, and the CPU state of the 64-bit boot protocol. The other modules each build one of
these from values, so that they can be tested byte by byte.
"""
