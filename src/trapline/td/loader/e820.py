"""The memory map in the form of the BIOS call that gave it its name (ACPI 6.4, 15.1)."""

import struct
from enum import IntEnum
from typing import NamedTuple

from trapline.td.loader import layout

ENTRY = struct.Struct("<QQI")
MAX_ENTRIES = 128  # E820_MAX_ENTRIES_ZEROPAGE


class E820Type(IntEnum):
    """What a range is used for. Unaccepted memory has no type here: only EFI can tell."""

    RAM = 1
    RESERVED = 2
    ACPI = 3


class Range(NamedTuple):
    """`size` bytes from GPA `start`."""

    start: int
    size: int
    type: E820Type

    def pack(self) -> bytes:
        """Return the 20 bytes of a boot_e820_entry."""
        return ENTRY.pack(self.start, self.size, self.type)


def memory_map(memory: int) -> tuple[Range, ...]:
    """Return the map of a TD with `memory` bytes of RAM."""
    return (
        Range(0, layout.LOW_MEMORY_END, E820Type.RAM),
        Range(
            layout.LOW_MEMORY_END,
            layout.ACPI_TABLES - layout.LOW_MEMORY_END,
            E820Type.RESERVED,
        ),
        Range(layout.ACPI_TABLES, layout.ACPI_TABLES_END - layout.ACPI_TABLES, E820Type.ACPI),
        Range(layout.EFI_TABLES, layout.EFI_TABLES_END - layout.EFI_TABLES, E820Type.RESERVED),
        Range(layout.HIGH_MEMORY, memory - layout.HIGH_MEMORY, E820Type.RAM),
    )
