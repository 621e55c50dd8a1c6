"""What can be booted, and one sentence for each thing that cannot."""

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.base.errors import BadImageError, BadMachineError, NotATdxKernelError, TraplineError
from trapline.machine.loader import kernelimage

MESSAGE = b"\0016tdx: Guest detected\n\0"
KERNEL = 0x1000000


def elf(text=b"\x90" * 64, rodata=MESSAGE, *, physical=KERNEL, entry=KERNEL, kind=2, **changes):
    """Build a kernel of one segment, with a .rodata section."""
    names = b"\0.rodata\0.shstrtab\0"
    phoff, at = 64, 64 + 56
    rodata_at = at + len(text)
    names_at = rodata_at + len(rodata)
    shoff = names_at + len(names)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01" + bytes(9),
        kind, 62, 1, entry, phoff, shoff, 0, 64, 56, 1, 64, 3, 2,
    )  # fmt: skip
    fields = {"size": len(text), "memory": len(text) + 4096, **changes}
    segment = struct.pack(
        "<IIQQQQQQ", 1, 7, at, 0xFFFFFFFF81000000, physical, fields["size"], fields["memory"], 4096
    )
    sections = bytes(64)
    sections += struct.pack(
        "<IIQQQQIIQQ", 1, 1, 2, 0xFFFFFFFF82000000, rodata_at, len(rodata), 0, 0, 1, 0
    )
    sections += struct.pack("<IIQQQQIIQQ", 9, 3, 0, 0, names_at, len(names), 0, 0, 1, 0)
    return header + segment + text + rodata + names + sections


def bzimage(kernel, *, xloadflags=1, pref=KERNEL, init_size=0x400000, body=None):
    """Build a boot image around a kernel."""
    payload = zlib.compressobj(wbits=31)
    packed = payload.compress(kernel) + payload.flush()
    code = bytes(0x200) + b"\xf4" * 64
    start = len(code)
    image = bytearray(2 * 512)
    image[0x1F1] = 1
    image[0x201] = 0x6A  # the header ends at 0x26c
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x20F)
    struct.pack_into("<I", image, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<H", image, 0x236, xloadflags)
    struct.pack_into("<I", image, 0x238, 2047)
    struct.pack_into("<II", image, 0x248, start, len(packed))
    struct.pack_into("<QI", image, 0x258, pref, init_size)
    return bytes(image) + (code + packed if body is None else body)


@pytest.fixture
def opened(tmp_path):
    def write(data):
        path = tmp_path / "kernel"
        path.write_bytes(data)
        return kernelimage.open_image(path)

    return write


def test_a_vmlinux_is_taken_apart(opened):
    image = opened(elf(text=b"\xf4" * 100))
    assert image.kind == "vmlinux"
    assert image.entry == image.start == KERNEL
    assert image.end == KERNEL + 100 + 4096
    assert image.setup_header == b""
    ram = memoryview(bytearray(KERNEL + 0x10000))
    kernelimage.load(image, ram)
    assert ram[KERNEL : KERNEL + 101] == b"\xf4" * 100 + b"\0"


def test_a_boot_image_is_entered_at_its_64_bit_entry(opened):
    image = opened(bzimage(elf()))
    assert image.kind == "bzImage"
    assert image.entry == KERNEL + 0x200
    assert image.end == KERNEL + 0x400000
    assert len(image.setup_header) == 0x202 + 0x6A - 0x1F1
    ram = memoryview(bytearray(KERNEL + 0x10000))
    kernelimage.load(image, ram)
    assert ram[KERNEL + 0x200] == 0xF4


def test_a_32_bit_boot_image_is_no_td(opened):
    with pytest.raises(NotATdxKernelError, match="32-bit"):
        opened(bzimage(elf(), xloadflags=0))


@pytest.mark.parametrize("wrap", [lambda kernel: kernel, bzimage])
def test_a_kernel_without_tdx_support_is_refused(opened, wrap):
    with pytest.raises(NotATdxKernelError, match="CONFIG_INTEL_TDX_GUEST"):
        opened(wrap(elf(rodata=b"no such message\0")))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (elf(kind=3), "module or a program"),
        (elf(kind=1), "module or a program"),
        (elf(entry=KERNEL + 0x10000), "outside of what it loads"),
        (elf(size=0, memory=0), "nothing to load"),
        (bzimage(elf(), pref=0), "how much memory"),
        (bzimage(elf(), init_size=0), "how much memory"),
        (b"MZ" + bytes(2000), r"\.$"),
        (b"", r"\.$"),
    ],
)
def test_what_is_no_kernel_is_refused(opened, data, message):
    with pytest.raises(BadImageError, match=message):
        opened(data)


def test_a_kernel_that_wants_low_memory_is_refused(opened):
    image = opened(elf(physical=0x1000, entry=0x1000))
    with pytest.raises(BadImageError, match="below 1 MiB"):
        kernelimage.load(image, memoryview(bytearray(64 << 20)))


def test_a_kernel_larger_than_memory_is_refused(opened):
    image = opened(elf(memory=1 << 30))
    with pytest.raises(BadMachineError, match="give more with --memory"):
        kernelimage.load(image, memoryview(bytearray(32 << 20)))


@given(st.integers(0, 1200), st.binary(min_size=1, max_size=16))
def test_damaged_images_end_in_one_sentence(at, damage):
    for good in (elf(), bzimage(elf())):
        data = bytearray(good)
        data[at : at + len(damage)] = damage
        try:
            if data[:4] == b"\x7fELF":
                image = kernelimage.vmlinux(kernelimage.ElfFile.open(bytes(data)))
            else:
                image = kernelimage.boot_image(bytes(data), "kernel")
            kernelimage.load(image, memoryview(bytearray(24 << 20)))
        except TraplineError as error:
            text = str(error)
        else:
            text = "."
        assert text.endswith(".")
        assert "\n" not in text
