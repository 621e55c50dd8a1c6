"""The memory map in the form of the BIOS call that gave it its name (ACPI 6.4, 15.1)."""

import struct
from enum import IntEnum
from typing import NamedTuple

from trapline.machine.loader import gpamap

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
        Range(0, gpamap.LOW_MEMORY_END, E820Type.RAM),
        Range(
            gpamap.LOW_MEMORY_END,
            gpamap.ACPI_TABLES - gpamap.LOW_MEMORY_END,
            E820Type.RESERVED,
        ),
        Range(gpamap.ACPI_TABLES, gpamap.ACPI_TABLES_END - gpamap.ACPI_TABLES, E820Type.ACPI),
        Range(gpamap.EFI_TABLES, gpamap.EFI_TABLES_END - gpamap.EFI_TABLES, E820Type.RESERVED),
        Range(gpamap.HIGH_MEMORY, memory - gpamap.HIGH_MEMORY, E820Type.RAM),
    )
