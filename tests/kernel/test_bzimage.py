"""Boot images: the setup header, and the kernel inside."""

import pytest
from hypothesis import given
from mutations import damaged, only_bad_image

from elf_images import boot_image, packed, vmlinux
from trapline.base.errors import BadImageError, KernelNotFoundError
from trapline.kernel.elf.bzimage import (
    is_boot_image,
    open_vmlinuz,
    read_setup_header,
    unpack_vmlinuz,
)

KERNEL = vmlinux(dwarf=False)
PACKED = packed(KERNEL)
each_format = pytest.mark.parametrize("codec", PACKED)


def test_setup_header():
    header = read_setup_header(boot_image(KERNEL))
    assert header.protocol == 0x20F
    assert header.version == "6.12.1-test (someone) #1 SMP"
    assert header.release == "6.12.1-test"
    assert header.protected_mode_offset == 3 * 512
    assert header.init_size == 0x3000000
    assert header.pref_address == 0x1000000
    assert header.kernel_alignment == 0x200000
    assert header.relocatable
    assert header.xloadflags & 1 << 5  # XLF_5LEVEL
    assert header.cmdline_size == 2047
    assert header.initrd_addr_max == 0x7FFFFFFF


def test_old_protocols_have_fewer_fields():
    header = read_setup_header(boot_image(KERNEL, protocol=0x204))
    assert header.cmdline_size == 255
    assert header.payload_offset == header.payload_length == header.init_size == 0
    assert not header.relocatable


def test_no_version_string():
    image = bytearray(boot_image(KERNEL))
    image[0x20E:0x210] = b"\0\0"
    header = read_setup_header(bytes(image))
    assert header.version is None
    assert header.release is None


@each_format
def test_unpacks_by_the_header(codec):
    assert unpack_vmlinuz(boot_image(KERNEL, packed=PACKED[codec])) == KERNEL


@each_format
def test_unpacks_old_images_by_search(codec):
    image = boot_image(KERNEL, packed=PACKED[codec], protocol=0x206)
    assert unpack_vmlinuz(image) == KERNEL


@each_format
def test_unpacks_wrapped_images_by_search(codec):
    # False starts: the bare magic of each format comes first.
    decoys = b"".join(payload[:3] + b"\xaa\x55" * 8 for payload in PACKED.values())
    image = decoys + b"\xcc" * 100 + PACKED[codec] + b"\xcc" * 100
    assert not is_boot_image(image)
    assert unpack_vmlinuz(image) == KERNEL


def test_opens_as_elf(tmp_path):
    path = tmp_path / "vmlinuz"
    path.write_bytes(boot_image(KERNEL))
    with open_vmlinuz(path) as elf:
        assert elf.name == str(path)
        assert b"Linux version 6.12.1-test" in bytes(elf.contents(".rodata"))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "holds no compressed Linux kernel"),
        (bytes(5000), "holds no compressed Linux kernel"),
        (boot_image(KERNEL)[:-300], "truncated: the kernel inside it ends at byte"),
        (boot_image(KERNEL)[:0x280], "truncated within the setup code"),
        (boot_image(b"not an ELF"), "is not an ELF kernel"),
        (boot_image(KERNEL, packed=bytes(64)), "holds no compressed Linux kernel"),
        (boot_image(KERNEL, packed=PACKED["xz"][:64]), "xz data is (truncated|corrupt)"),
    ],
)
def test_broken_images(image, message):
    with pytest.raises(BadImageError, match=message):
        unpack_vmlinuz(image)


def test_header_is_asked_of_something_else():
    with pytest.raises(BadImageError, match="not an x86 boot image"):
        read_setup_header(KERNEL)


def test_absent_file(tmp_path):
    with pytest.raises(KernelNotFoundError):
        open_vmlinuz(tmp_path / "vmlinuz")


@given(damaged(boot_image(KERNEL), header=0x270))
def test_only_bad_image_error_escapes(image):
    with only_bad_image():
        if is_boot_image(image):
            read_setup_header(image)
        unpack_vmlinuz(image)


@pytest.mark.kernel
def test_debian_kernel(debian_kernel):
    with debian_kernel.vmlinuz.open("rb") as file:
        image = file.read()
    assert read_setup_header(image).release == debian_kernel.release
    with open_vmlinuz(debian_kernel.vmlinuz) as inner:
        assert inner.section(".altinstructions").size > 0
        assert inner.section(".debug_info") is None
    # Found by search too, as in a unified kernel image.
    with open_vmlinuz(debian_kernel.vmlinuz) as inner:
        assert unpack_vmlinuz(b"\0" * 4096 + image) == bytes(inner.data)
