"""A kernel as a boot loader sees it: what to put where in guest memory, and where to start.

A boot image is started at the 64-bit entry of its decompressor, 0x200 bytes into the
protected-mode part (Documentation/arch/x86/boot.rst, "64-bit boot protocol"). A vmlinux is put
where its program headers want it and started at its ELF entry, which on x86-64 is the physical
address of startup_64.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from trapline.base.errors import BadImageError, BadMachineError, NotATdxKernelError
from trapline.base.mapping import mapped
from trapline.kernel.elf import bzimage
from trapline.kernel.elf.file import ElfFile
from trapline.machine.loader import gpamap

ENTRY64_OFFSET: Final = 0x200
_ET_EXEC: Final = 2  # elf(5)
_PT_LOAD: Final = 1
_HEADER_START: Final = 0x1F1
_JUMP_LENGTH_AT: Final = 0x201
_HEADER_END_BASE: Final = 0x202
_VMLINUX_INITRD_MAX: Final = 0x7FFF_FFFF
_DEFAULT_CMDLINE: Final = 2047
# arch/x86/coco/tdx/tdx.c, tdx_early_init(): printed by every kernel that can be a TD, and left
# in .rodata whatever else was stripped.
_TDX_MESSAGE: Final = b"tdx: Guest detected"


@dataclass(frozen=True, slots=True)
class Piece:
    """`data` at GPA `address`; the rest of `size` bytes is zero."""

    address: int
    data: memoryview
    size: int


@dataclass(frozen=True, slots=True)
class KernelImage:
    """What to load.

    `setup_header` is empty for a vmlinux. `start` and `end` bound the memory that the kernel
    takes before it has read its memory map. `build_id` is that of the ELF kernel.
    """

    kind: Literal["vmlinux", "bzImage"]
    name: str
    pieces: tuple[Piece, ...]
    entry: int
    start: int
    end: int
    setup_header: bytes
    initrd_max: int
    cmdline_max: int
    build_id: str | None = None


def open_image(path: Path) -> KernelImage:
    """Read a vmlinux or a boot image.

    Raises BadImageError for anything else, NotATdxKernelError for a kernel that cannot be a TD.
    """
    with mapped(path) as data:
        if bzimage.is_boot_image(data):
            return boot_image(bytes(data), str(path))
    with ElfFile.open(path) as elf:
        return vmlinux(elf)


def vmlinux(elf: ElfFile) -> KernelImage:
    """Take the loadable segments of an ELF kernel."""
    if elf.type != _ET_EXEC:
        raise BadImageError(f"{elf.name}: is a module or a program, not a kernel to boot.")
    _require_tdx(bytes(elf.contents(".rodata")), elf.name)
    segments = [part for part in elf.segments if part.type == _PT_LOAD and part.memory_size]
    if not segments:
        raise BadImageError(f"{elf.name}: has nothing to load; give the linked vmlinux.")
    if sum(part.file_size for part in segments) > len(elf.data):
        raise BadImageError(f"{elf.name}: its segments overlap: together they exceed the file.")
    pieces = tuple(
        Piece(
            part.physical_address,
            memoryview(bytes(elf.data[part.offset : part.offset + part.file_size])),
            part.memory_size,
        )
        for part in segments
    )
    start = min(piece.address for piece in pieces)
    end = max(piece.address + piece.size for piece in pieces)
    if not start <= elf.entry < end:
        raise BadImageError(f"{elf.name}: starts at {elf.entry:#x}, outside of what it loads.")
    return KernelImage(
        "vmlinux", elf.name, pieces, elf.entry, start, end, b"", _VMLINUX_INITRD_MAX,
        _DEFAULT_CMDLINE, elf.build_id,
    )  # fmt: skip


def boot_image(data: bytes, name: str) -> KernelImage:
    """Take the protected-mode part of a boot image, for its preferred address."""
    header = bzimage.read_setup_header(data, name=name)
    if not header.xloadflags & bzimage.XLF_KERNEL_64:
        raise NotATdxKernelError(f"{name}: is a 32-bit kernel; a TD needs a 64-bit one.")
    if not header.pref_address or not header.init_size:
        raise BadImageError(f"{name}: its setup header does not say how much memory it needs.")
    kernel = bzimage.unpack_vmlinuz(data, name=name)
    _require_tdx(kernel, name)
    with ElfFile.open(kernel, name=name) as elf:
        build_id = elf.build_id
    start = header.pref_address
    code = memoryview(data)[header.protected_mode_offset :]
    end = start + max(header.init_size, len(code))
    entry = start + ENTRY64_OFFSET
    if len(code) <= ENTRY64_OFFSET:
        raise BadImageError(f"{name}: the file is truncated: its 64-bit entry is missing.")
    # The header ends where the jump in front of it lands (boot.rst, "Details of header fields").
    header_end = _HEADER_END_BASE + data[_JUMP_LENGTH_AT]
    return KernelImage(
        "bzImage", name, (Piece(start, code, len(code)),), entry, start, end,
        data[_HEADER_START:header_end], header.initrd_addr_max, header.cmdline_size,
        build_id,
    )  # fmt: skip


def _require_tdx(image: bytes, name: str) -> None:
    if _TDX_MESSAGE not in image:
        raise NotATdxKernelError(
            f"{name}: was built without CONFIG_INTEL_TDX_GUEST, so it cannot run as a TD; "
            "use a kernel of 5.19 or later that has it (Debian: 6.12)."
        )


def load(image: KernelImage, ram: memoryview) -> None:
    """Copy the pieces; raises BadMachineError where they do not fit into `ram`."""
    for piece in image.pieces:
        end = piece.address + piece.size
        if piece.address < gpamap.HIGH_MEMORY or len(piece.data) > piece.size:
            raise BadImageError(f"{image.name}: wants to be loaded below 1 MiB.")
        if end > len(ram):
            raise BadMachineError(
                f"{image.name} needs memory up to {-(-image.end // gpamap.MIB)} MiB, the machine "
                f"has {len(ram) // gpamap.MIB} MiB; give more with --memory."
            )
        ram[piece.address : piece.address + len(piece.data)] = piece.data
