"""The EFI tables that tell a kernel about unaccepted memory.

The memory map in the zero page has no type for it. A TD's firmware lists it in the EFI memory
map as type 15, and the kernel's EFI stub turns that into a bitmap, LINUX_EFI_UNACCEPTED_MEM_TABLE
(drivers/firmware/efi/libstub/unaccepted_memory.c). The 64-bit entry of the boot image is behind
the stub, so the loader stands in for both: the decompressor finds the bitmap through the system
table (arch/x86/boot/compressed/mem.c) and places the kernel by the memory map
(compressed/kaslr.c); the kernel proper does the same (drivers/firmware/efi/efi.c). There are no
runtime services: no range asks for a runtime mapping, and the kernel says so once.
"""

import struct
from enum import IntEnum
from typing import Final, NamedTuple
from uuid import UUID

from trapline.machine.loader import gpamap
from trapline.machine.loader.bootparams import EfiInfo

UNACCEPTED_TABLE_GUID: Final = UUID("d5d1de3c-105c-44f9-9ea9-bcef98120031")
ACPI_20_TABLE_GUID: Final = UUID("8868e871-e4f1-11d3-bc22-0080c73c8881")
SYSTEM_TABLE_SIGNATURE: Final = 0x5453_5953_2049_4249  # "IBI SYST"
SYSTEM_TABLE_REVISION: Final = 2 << 16 | 100  # UEFI 2.10
MEMORY_WB: Final = 1 << 3
DESCRIPTOR: Final = struct.Struct("<IIQQQQ")
DESCRIPTOR_SIZE: Final = 48  # larger than the structure, as firmware has it
DESCRIPTOR_VERSION: Final = 1
UNIT: Final = 2 * gpamap.MIB  # EFI_UNACCEPTED_UNIT_SIZE is PMD_SIZE on x86
UNACCEPTED_VERSION: Final = 1

_VENDOR_AT: Final = 0x000
_SYSTEM_TABLE_AT: Final = 0x100
_CONFIG_TABLE_AT: Final = 0x200
_MEMORY_MAP_AT: Final = 0x300
_UNACCEPTED_AT: Final = 0x1000  # page-aligned: the kernel reserves whole pages


class EfiMemoryType(IntEnum):
    """UEFI 2.10, table 7.10."""

    RESERVED = 0
    CONVENTIONAL = 7
    ACPI_RECLAIM = 9
    UNACCEPTED = 15


class EfiRange(NamedTuple):
    """`size` bytes from GPA `start`."""

    start: int
    size: int
    type: EfiMemoryType

    def pack(self) -> bytes:
        """Return one EFI_MEMORY_DESCRIPTOR, padded to `DESCRIPTOR_SIZE`."""
        pages = self.size // gpamap.PAGE
        data = DESCRIPTOR.pack(self.type, 0, self.start, 0, pages, MEMORY_WB)
        return data.ljust(DESCRIPTOR_SIZE, b"\0")


class EfiTables(NamedTuple):
    """The tables as one block for `gpamap.EFI_TABLES`."""

    data: bytes
    info: EfiInfo


def memory_map(memory: int, unaccepted: int, end: int) -> tuple[EfiRange, ...]:
    """Return the EFI memory map; [unaccepted, end) is not accepted, all else is."""
    ranges = [
        # The kernel takes no EFI range below 4 KiB pages: 0x9fc00 is rounded down.
        EfiRange(0, gpamap.LOW_MEMORY_END & -gpamap.PAGE, EfiMemoryType.CONVENTIONAL),
        EfiRange(
            gpamap.ACPI_TABLES,
            gpamap.ACPI_TABLES_END - gpamap.ACPI_TABLES,
            EfiMemoryType.ACPI_RECLAIM,
        ),
        EfiRange(
            gpamap.EFI_TABLES,
            gpamap.EFI_TABLES_END - gpamap.EFI_TABLES,
            EfiMemoryType.RESERVED,
        ),
        EfiRange(gpamap.HIGH_MEMORY, unaccepted - gpamap.HIGH_MEMORY, EfiMemoryType.CONVENTIONAL),
        EfiRange(unaccepted, end - unaccepted, EfiMemoryType.UNACCEPTED),
        EfiRange(end, memory - end, EfiMemoryType.CONVENTIONAL),
    ]
    return tuple(entry for entry in ranges if entry.size)


def unaccepted_table(start: int, end: int) -> bytes:
    """Build struct efi_unaccepted_memory: one bit for each 2 MiB, set where not accepted.

    `start` and `end` are multiples of 2 MiB.
    """
    units = (end - start) // UNIT
    size = -(-units // 64) * 8  # whole 64-bit words: the kernel walks it with bitmap operations
    bitmap = ((1 << units) - 1).to_bytes(size, "little")
    return struct.pack("<IIQQ", UNACCEPTED_VERSION, UNIT, start, size) + bitmap


def _system_table(vendor: int, config_table: int, entries: int) -> bytes:
    header_size = 120
    header = struct.pack("<QIIII", SYSTEM_TABLE_SIGNATURE, SYSTEM_TABLE_REVISION, header_size, 0, 0)
    # Console handles and protocols, runtime and boot services: six and two null pointers.
    fields = struct.pack("<QI4x8QQQ", vendor, 1, *[0] * 8, entries, config_table)
    return header + fields


def tables(memory: int, unaccepted: int, end: int, rsdp: int) -> EfiTables:
    """Lay out system table, configuration table, memory map and bitmap."""
    base = gpamap.EFI_TABLES
    ranges = b"".join(entry.pack() for entry in memory_map(memory, unaccepted, end))
    config = [
        UNACCEPTED_TABLE_GUID.bytes_le + struct.pack("<Q", base + _UNACCEPTED_AT),
        ACPI_20_TABLE_GUID.bytes_le + struct.pack("<Q", rsdp),
    ]
    parts = {
        _VENDOR_AT: "trapline\0".encode("utf-16-le"),
        _SYSTEM_TABLE_AT: _system_table(base + _VENDOR_AT, base + _CONFIG_TABLE_AT, len(config)),
        _CONFIG_TABLE_AT: b"".join(config),
        _MEMORY_MAP_AT: ranges,
        _UNACCEPTED_AT: unaccepted_table(unaccepted, end),
    }
    blob = bytearray(gpamap.EFI_TABLES_END - base)
    for offset, data in parts.items():
        blob[offset : offset + len(data)] = data
    info = EfiInfo(
        base + _SYSTEM_TABLE_AT,
        base + _MEMORY_MAP_AT,
        len(ranges),
        DESCRIPTOR_SIZE,
        DESCRIPTOR_VERSION,
    )
    return EfiTables(bytes(blob), info)
