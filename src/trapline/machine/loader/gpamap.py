"""Where things are in guest physical memory; all below 1 MiB except kernel and initrd.

The areas below 640 KiB are free for the kernel once it has copied the boot parameters and the
command line; the ACPI and EFI tables are in a part of the memory map that it must keep.
"""

from typing import Final

PAGE: Final = 4096
MIB: Final = 1 << 20
GIB: Final = 1 << 30
DEFAULT_MEMORY: Final = 512 * MIB

GDT: Final = 0x6000
BOOT_STACK: Final = 0x8000  # grows down; the decompressor and the kernel set up their own
BOOT_PARAMS: Final = 0x10000
COMMAND_LINE: Final = 0x20000
COMMAND_LINE_ROOM: Final = 0x1000
PAGE_TABLES: Final = 0x70000  # one PML4, one PDPT, four page directories

LOW_MEMORY_END: Final = 0x9FC00
ACPI_TABLES: Final = 0xE0000
ACPI_TABLES_END: Final = 0xF0000
EFI_TABLES: Final = 0xF0000
EFI_TABLES_END: Final = 0x100000
HIGH_MEMORY: Final = 0x100000

# What a PCI host bridge decodes, and the inputs of the IO-APIC that INTA to INTD of slot 1 reach.
PCI_CONFIG_PORTS: Final = range(0xCF8, 0xD00)
PCI_PORTS: Final = range(0xC000, 0x10000)
PCI_MMIO: Final = range(0xE000_0000, 0xFEC0_0000)
PCI_GSIS: Final = (5, 6, 9, 10)

# RAM is one piece from GPA 0; above it are the IO-APIC, the HPET and the local APIC.
MAX_MEMORY: Final = 3 * GIB
MIN_MEMORY: Final = 32 * MIB
IOAPIC: Final = 0xFEC0_0000
HPET: Final = 0xFED0_0000
MMIO_UART: Final = 0xFED8_0000
LOCAL_APIC: Final = 0xFEE0_0000
