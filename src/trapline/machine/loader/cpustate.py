"""The processor as the 64-bit boot protocol wants it (Documentation/arch/x86/boot.rst).

Long mode, paging on with the first 4 GiB mapped one to one in 2 MiB pages, __BOOT_CS (0x10) and
__BOOT_DS (0x18) flat, interrupts off, RSI at the zero page. All of it is private memory.
"""

import struct
from typing import Final

from trapline.cpu.engine import Reg, SegmentRegister, Vcpu
from trapline.machine.loader import gpamap

CODE64_DESCRIPTOR: Final = 0x00AF_9B00_0000_FFFF
DATA_DESCRIPTOR: Final = 0x00CF_9300_0000_FFFF
BOOT_CS: Final = 0x10
BOOT_DS: Final = 0x18
FLAT_LIMIT: Final = 0xFFFF_FFFF

CR0_PE_MP_ET_NE_WP_PG: Final = 0x8001_0033
CR4_DE_PAE_MCE: Final = 0x68
EFER: Final = 0xC000_0080
EFER_LME_LMA_NXE: Final = 0xD00
RFLAGS_FIXED: Final = 0x2

_TABLE: Final = 0x03  # present, writable
_LARGE_PAGE: Final = 0x83  # present, writable, 2 MiB
_GIGABYTES: Final = 4
_ENTRIES: Final = 512


def descriptor_table() -> bytes:
    """Build the GDT: two null descriptors, then code and data."""
    return struct.pack("<4Q", 0, 0, CODE64_DESCRIPTOR, DATA_DESCRIPTOR)


def page_tables() -> bytes:
    """Build PML4, PDPT and four page directories for `gpamap.PAGE_TABLES`."""
    base = gpamap.PAGE_TABLES
    page = gpamap.PAGE
    tables = bytearray(page * (2 + _GIGABYTES))
    struct.pack_into("<Q", tables, 0, base + page | _TABLE)
    for gigabyte in range(_GIGABYTES):
        directory = base + page * (2 + gigabyte)
        struct.pack_into("<Q", tables, page + 8 * gigabyte, directory | _TABLE)
        for entry in range(_ENTRIES):
            address = gigabyte << 30 | entry << 21
            offset = page * (2 + gigabyte) + 8 * entry
            struct.pack_into("<Q", tables, offset, address | _LARGE_PAGE)
    return bytes(tables)


def _attributes(descriptor: int) -> int:
    return descriptor >> 32 & 0x00F0_FF00


def enter_long_mode(vcpu: Vcpu, entry: int) -> None:
    """Write GDT and page tables to memory and put the processor at `entry`."""
    gdt = descriptor_table()
    tables = page_tables()
    vcpu.memory.ram[gpamap.GDT : gpamap.GDT + len(gdt)] = gdt
    vcpu.memory.ram[gpamap.PAGE_TABLES : gpamap.PAGE_TABLES + len(tables)] = tables
    vcpu.set_segment("gdtr", SegmentRegister(0, gpamap.GDT, len(gdt) - 1, 0))
    vcpu.set_segment("idtr", SegmentRegister(0, 0, 0, 0))
    vcpu.set_msr(EFER, EFER_LME_LMA_NXE)
    vcpu.set_cr(4, CR4_DE_PAE_MCE)
    vcpu.set_cr(3, gpamap.PAGE_TABLES)
    vcpu.set_cr(0, CR0_PE_MP_ET_NE_WP_PG)
    code = SegmentRegister(BOOT_CS, 0, FLAT_LIMIT, _attributes(CODE64_DESCRIPTOR))
    data = SegmentRegister(BOOT_DS, 0, FLAT_LIMIT, _attributes(DATA_DESCRIPTOR))
    vcpu.set_segment("cs", code)
    for name in ("ss", "ds", "es", "fs", "gs"):
        vcpu.set_segment(name, data)
    vcpu.rflags = RFLAGS_FIXED
    registers = vcpu.regs
    for register in range(Reg.RIP):
        registers[register] = 0
    registers[Reg.RSI] = gpamap.BOOT_PARAMS
    registers[Reg.RSP] = gpamap.BOOT_STACK
    registers[Reg.RIP] = entry
