"""The x86 boot image: its setup header, and the ELF kernel packed inside.

A vmlinuz (bzImage) is a real-mode part with the setup header, then a protected-mode part that
holds the decompressor and, as payload, the compressed vmlinux: an ELF file with its section
headers, stripped of debug information, followed by relocations where the kernel is relocatable.
Since boot protocol 2.08 the header says where the payload is; in anything else (older kernels,
unified kernel images, firmware volumes) the payload is searched by its magic.

Source: Documentation/arch/x86/boot.rst.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trapline.base.errors import BadImageError
from trapline.base.mapping import mapped
from trapline.base.printable import decode_name
from trapline.kernel.elf import compression
from trapline.kernel.elf.file import ElfFile

XLF_KERNEL_64: Final = 1 << 0

_SECTOR: Final = 512
_HEADER_AT: Final = 0x1F1
_MAGIC_AT: Final = 0x202
_MAGIC: Final = b"HdrS"
_VERSION_BASE: Final = 0x200
_MAX_VERSION: Final = 256
_PROTOCOL_RELOCATABLE: Final = 0x205
_PROTOCOL_CMDLINE: Final = 0x206
_PROTOCOL_PAYLOAD: Final = 0x208
_PROTOCOL_INIT_SIZE: Final = 0x20A
_PROTOCOL_XLOADFLAGS: Final = 0x20C
_PROTOCOL_KERNEL_INFO: Final = 0x20F
_DEFAULT_SETUP_SECTORS: Final = 4
_DEFAULT_CMDLINE: Final = 255
# The unpacked kernel of a distribution is 40 to 120 MiB.
_MAX_KERNEL: Final = 1 << 30
_MAX_CANDIDATES: Final = 256


@dataclass(frozen=True, slots=True)
class SetupHeader:
    """The setup header of a boot image; offsets and sizes in bytes.

    `protocol` is 0x20f for 2.15. `version` is the kernel's version string ("6.12.117 (…) #1 …").
    `protected_mode_offset` is where the protected-mode part starts in the file;
    `payload_offset` counts from there. Fields that are newer than `protocol` are 0.
    `min_alignment` is the exponent of a power of two.
    """

    protocol: int
    version: str | None
    protected_mode_offset: int
    loadflags: int
    code32_start: int
    initrd_addr_max: int
    kernel_alignment: int
    relocatable: bool
    min_alignment: int
    xloadflags: int
    cmdline_size: int
    payload_offset: int
    payload_length: int
    pref_address: int
    init_size: int
    handover_offset: int
    kernel_info_offset: int

    @property
    def release(self) -> str | None:
        """What `uname -r` prints: the first word of `version`."""
        words = (self.version or "").split()
        return words[0] if words else None


def is_boot_image(image: bytes | memoryview) -> bool:
    """Whether an x86 setup header is there, of a protocol that has one (2.00 and later)."""
    return bytes(image[_MAGIC_AT : _MAGIC_AT + 4]) == _MAGIC


def read_setup_header(image: bytes | memoryview, *, name: str = "boot image") -> SetupHeader:
    """Read the setup header of a whole boot image.

    Raises BadImageError where there is none, or it points outside of the image.
    """
    if not is_boot_image(image):
        raise BadImageError(f"{name}: is not an x86 boot image (no setup header).")
    padded = bytes(image[:0x270]).ljust(0x270, b"\0")
    (protocol,) = struct.unpack_from("<H", padded, 0x206)
    sectors = padded[_HEADER_AT] or _DEFAULT_SETUP_SECTORS
    start = (sectors + 1) * _SECTOR
    if start > len(image):
        raise BadImageError(f"{name}: the file is truncated within the setup code.")

    def field(code: str, offset: int, since: int) -> int:
        value: int = struct.unpack_from("<" + code, padded, offset)[0]
        return value if protocol >= since else 0

    return SetupHeader(
        protocol=protocol,
        version=_version(image, field("H", 0x20E, 0)),
        protected_mode_offset=start,
        loadflags=padded[0x211],
        code32_start=field("I", 0x214, 0),
        initrd_addr_max=field("I", 0x22C, 0x203),
        kernel_alignment=field("I", 0x230, _PROTOCOL_RELOCATABLE),
        relocatable=bool(field("B", 0x234, _PROTOCOL_RELOCATABLE)),
        min_alignment=field("B", 0x235, _PROTOCOL_INIT_SIZE),
        xloadflags=field("H", 0x236, _PROTOCOL_XLOADFLAGS),
        cmdline_size=field("I", 0x238, _PROTOCOL_CMDLINE) or _DEFAULT_CMDLINE,
        payload_offset=field("I", 0x248, _PROTOCOL_PAYLOAD),
        payload_length=field("I", 0x24C, _PROTOCOL_PAYLOAD),
        pref_address=field("Q", 0x258, _PROTOCOL_INIT_SIZE),
        init_size=field("I", 0x260, _PROTOCOL_INIT_SIZE),
        handover_offset=field("I", 0x264, 0x20B),
        kernel_info_offset=field("I", 0x268, _PROTOCOL_KERNEL_INFO),
    )


def unpack_vmlinuz(image: bytes | memoryview, *, name: str = "boot image") -> bytes:
    """Return the ELF kernel inside a boot image, with whatever the build put after it.

    Raises BadImageError where there is none, or it is truncated or corrupt.
    """
    view = memoryview(image)
    if is_boot_image(view):
        header = read_setup_header(view, name=name)
        if header.payload_length:
            start = header.protected_mode_offset + header.payload_offset
            end = start + header.payload_length
            if end > len(view):
                raise BadImageError(
                    f"{name}: the file is truncated: the kernel inside it ends at byte {end}, "
                    f"the file at byte {len(view)}."
                )
            if compression.detect(view[start:end]) is not None:
                return _unpack(view[start:end], name)
    for start in _candidates(view):
        try:
            first = compression.peek(view[start:], 4)
        except BadImageError:
            continue
        if first == b"\x7fELF":
            return _unpack(view[start:], name)
    raise BadImageError(f"{name}: holds no compressed Linux kernel; give a vmlinux or a vmlinuz.")


def open_vmlinuz(path: Path, *, name: str | None = None) -> ElfFile:
    """Open the ELF kernel inside a boot image.

    Raises KernelNotFoundError where the file cannot be read, else as `unpack_vmlinuz`.
    """
    name = name or str(path)
    with mapped(path, name) as data:
        kernel = unpack_vmlinuz(data, name=name)
    return ElfFile.open(kernel, name=name)


def _unpack(payload: memoryview, name: str) -> bytes:
    kernel = compression.decompress(payload, limit=_MAX_KERNEL, name=name)
    if not kernel.startswith(b"\x7fELF"):
        raise BadImageError(f"{name}: the payload of the boot image is not an ELF kernel.")
    return kernel


def _version(image: bytes | memoryview, pointer: int) -> str | None:
    if pointer == 0:
        return None
    start = _VERSION_BASE + pointer
    text, end, _ = bytes(image[start : start + _MAX_VERSION]).partition(b"\0")
    return decode_name(text) if end and text else None


def _candidates(view: memoryview) -> list[int]:
    """Offsets where a compressed stream may start, in order; a bounded number of them."""
    image = bytes(view)
    found: list[int] = []
    for codec, magic in compression.MAGIC.items():
        position = image.find(magic)
        count = 0
        while position >= 0 and count < _MAX_CANDIDATES:
            if codec != "lzma" or _plausible_lzma(image, position):
                found.append(position)
                count += 1
            position = image.find(magic, position + 1)
    return sorted(found)


def _plausible_lzma(image: bytes, position: int) -> bool:
    """Whether an lzma header follows: its magic alone is too weak to search for.

    The dictionary is a power of two of up to 128 MiB; the size is unknown (all ones) or small.
    """
    header = image[position + 1 : position + 13]
    dictionary = int.from_bytes(header[:4], "little")
    size = int.from_bytes(header[4:], "little")
    power_of_two = dictionary & (dictionary - 1) == 0
    return len(header) == 12 and power_of_two and (size == (1 << 64) - 1 or size <= _MAX_KERNEL)
