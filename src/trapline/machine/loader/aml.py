"""The few ACPI Machine Language constructs that the DSDT of a TD needs (ACPI 6.4, chapter 20).

Each function returns the bytes of one object; they nest as the ASL they are named after does.
"""

import struct

_SCOPE = b"\x10"
_NAME = b"\x08"
_DEVICE = b"\x5b\x82"
_PACKAGE = b"\x12"
_BUFFER = b"\x11"
_BYTE = b"\x0a"
_WORD = b"\x0b"
_DWORD = b"\x0c"
_ZERO = b"\x00"
_ONE = b"\x01"
_ROOT = b"\\"


def integer(value: int) -> bytes:
    """Encode an integer of up to 32 bits in its shortest form."""
    if value in (0, 1):
        return (_ZERO, _ONE)[value]
    if value < 1 << 8:
        return _BYTE + struct.pack("<B", value)
    if value < 1 << 16:
        return _WORD + struct.pack("<H", value)
    return _DWORD + struct.pack("<I", value)


def package_length(payload: int) -> bytes:
    """Encode PkgLength for that many bytes behind it; the length counts its own bytes."""
    if payload + 1 < 1 << 6:
        return bytes([payload + 1])
    for extra in (1, 2, 3):
        total = payload + 1 + extra
        if total < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little")
    raise ValueError("an AML package holds less than 256 MiB")


def _sized(opcode: bytes, payload: bytes) -> bytes:
    return opcode + package_length(len(payload)) + payload


def _segment(name: str) -> bytes:
    root, name = (_ROOT, name[1:]) if name.startswith("\\") else (b"", name)
    return root + name.encode("ascii").ljust(4, b"_")


def name(segment: str, value: bytes) -> bytes:
    """Encode Name(segment, value)."""
    return _NAME + _segment(segment) + value


def scope(segment: str, *members: bytes) -> bytes:
    """Encode Scope(segment) { members }."""
    return _sized(_SCOPE, _segment(segment) + b"".join(members))


def device(segment: str, *members: bytes) -> bytes:
    """Encode Device(segment) { members }."""
    return _sized(_DEVICE, _segment(segment) + b"".join(members))


def package(*elements: bytes) -> bytes:
    """Encode Package() { elements }."""
    return _sized(_PACKAGE, bytes([len(elements)]) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    """Encode Buffer() { data }."""
    return _sized(_BUFFER, integer(len(data)) + data)


def eisa_id(text: str) -> bytes:
    """Encode EisaId("PNPnnnn"): three letters of five bits, four hexadecimal digits."""
    letters = [ord(letter) - 0x40 & 0x1F for letter in text[:3]]
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return _DWORD + struct.pack(">I", value)


def resources(*descriptors: bytes) -> bytes:
    """Encode ResourceTemplate() { descriptors }; the checksum of 0 means "not checked"."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io_ports(start: int, count: int) -> bytes:
    """Encode IO(Decode16, start, start, 1, count)."""
    return struct.pack("<BBHHBB", 0x47, 1, start, start, 1, count)


def fixed_memory(start: int, size: int) -> bytes:
    """Encode Memory32Fixed(ReadWrite, start, size)."""
    return struct.pack("<BHBII", 0x86, 9, 1, start, size)


def bus_numbers(first: int, last: int) -> bytes:
    """Encode WordBusNumber(ResourceProducer, MinFixed, MaxFixed, …, first, last, …)."""
    return _window("<BHBBBHHHHH", 0x88, 2, 0, first, last)


def port_window(first: int, last: int) -> bytes:
    """Encode WordIO(ResourceProducer, MinFixed, MaxFixed, …, EntireRange, …, first, last, …)."""
    return _window("<BHBBBHHHHH", 0x88, 1, 3, first, last)


def memory_window(first: int, last: int) -> bytes:
    """Encode DWordMemory(ResourceProducer, …, NonCacheable, ReadWrite, …, first, last, …)."""
    return _window("<BHBBBIIIII", 0x87, 0, 1, first, last)


def _window(layout: str, tag: int, kind: int, flags: int, first: int, last: int) -> bytes:
    """Encode an address space descriptor (ACPI 6.4, 6.4.3.5)."""
    both_fixed, header = 0x0C, 3
    size = struct.calcsize(layout) - header
    fields = (0, first, last, 0, last - first + 1)
    return struct.pack(layout, tag, size, kind, both_fixed, flags, *fields)


def interrupt(gsi: int) -> bytes:
    """Encode Interrupt(ResourceConsumer, Edge, ActiveHigh, Exclusive) { gsi }."""
    consumer_edge_high = 0x03
    return struct.pack("<BHBBI", 0x89, 6, consumer_edge_high, 1, gsi)
