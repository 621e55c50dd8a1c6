"""The zero page: struct boot_params as the 64-bit boot protocol wants it.

Sources: Documentation/arch/x86/boot.rst and zero-page.rst, arch/x86/include/uapi/asm/bootparam.h.
"""

import struct
from dataclasses import dataclass
from typing import Final

from trapline.machine.loader import gpamap
from trapline.machine.loader.e820 import MAX_ENTRIES, Range

SIZE: Final = 4096
HEADER_START: Final = 0x1F1
HEADER_MAGIC: Final = b"HdrS"
DEFAULT_PROTOCOL: Final = 0x020F

# Offsets into the zero page.
ACPI_RSDP_ADDR: Final = 0x070
EFI_INFO: Final = 0x1C0
E820_ENTRIES: Final = 0x1E8
BOOT_FLAG: Final = 0x1FE
MAGIC: Final = 0x202
VERSION: Final = 0x206
TYPE_OF_LOADER: Final = 0x210
LOADFLAGS: Final = 0x211
CODE32_START: Final = 0x214
RAMDISK_IMAGE: Final = 0x218
CMD_LINE_PTR: Final = 0x228
KERNEL_ALIGNMENT: Final = 0x230
CMDLINE_SIZE: Final = 0x238
E820_TABLE: Final = 0x2D0

BOOT_FLAG_VALUE: Final = 0xAA55
LOADER_UNDEFINED: Final = 0xFF  # "no assigned id"
LOADED_HIGH: Final = 0x01
LINUX_ALIGNMENT: Final = 0x20_0000
MAX_CMDLINE: Final = 2047  # COMMAND_LINE_SIZE - 1 on x86
EFI64_SIGNATURE: Final = b"EL64"


@dataclass(frozen=True, slots=True)
class EfiInfo:
    """struct efi_info: where the EFI system table and memory map are."""

    system_table: int
    memory_map: int
    memory_map_size: int
    descriptor_size: int
    descriptor_version: int

    def pack(self) -> bytes:
        """Return the 32 bytes."""
        return EFI64_SIGNATURE + struct.pack(
            "<IIIIIII",
            self.system_table & 0xFFFF_FFFF,
            self.descriptor_size,
            self.descriptor_version,
            self.memory_map & 0xFFFF_FFFF,
            self.memory_map_size,
            self.system_table >> 32,
            self.memory_map >> 32,
        )


@dataclass(frozen=True, slots=True)
class BootParams:
    """What the loader tells the kernel; addresses are GPAs, sizes bytes.

    `header` is the setup header of the boot image from its offset 0x1f1 on, empty when a
    vmlinux is started directly. `load_address` is where the protected-mode part of a boot
    image was put.
    """

    memory_map: tuple[Range, ...]
    rsdp: int
    header: bytes = b""
    load_address: int = 0
    initrd: int = 0
    initrd_size: int = 0
    efi: EfiInfo | None = None

    def pack(self) -> bytes:
        """Return the page."""
        page = bytearray(SIZE)
        self._put_header(page)
        page[TYPE_OF_LOADER] = LOADER_UNDEFINED
        page[LOADFLAGS] |= LOADED_HIGH
        struct.pack_into("<I", page, CMD_LINE_PTR, gpamap.COMMAND_LINE)
        struct.pack_into("<II", page, RAMDISK_IMAGE, self.initrd, self.initrd_size)
        struct.pack_into("<Q", page, ACPI_RSDP_ADDR, self.rsdp)
        ranges = self.memory_map[:MAX_ENTRIES]
        page[E820_ENTRIES] = len(ranges)
        table = b"".join(entry.pack() for entry in ranges)
        page[E820_TABLE : E820_TABLE + len(table)] = table
        if self.efi is not None:
            info = self.efi.pack()
            page[EFI_INFO : EFI_INFO + len(info)] = info
        return bytes(page)

    def _put_header(self, page: bytearray) -> None:
        if self.header:
            page[HEADER_START : HEADER_START + len(self.header)] = self.header
            struct.pack_into("<I", page, CODE32_START, self.load_address)
            return
        # A vmlinux has no setup header; these are the fields the kernel proper reads.
        struct.pack_into("<H", page, BOOT_FLAG, BOOT_FLAG_VALUE)
        page[MAGIC : MAGIC + 4] = HEADER_MAGIC
        struct.pack_into("<H", page, VERSION, DEFAULT_PROTOCOL)
        struct.pack_into("<I", page, KERNEL_ALIGNMENT, LINUX_ALIGNMENT)
        struct.pack_into("<I", page, CMDLINE_SIZE, MAX_CMDLINE)
