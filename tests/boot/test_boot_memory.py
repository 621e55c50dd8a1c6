"""Zero page, EFI tables and the placement of kernel and initrd."""

import struct

import pytest

from trapline.base.errors import BadMachineError
from trapline.machine.loader import cpustate, e820, efi, gpamap, place
from trapline.machine.loader.acpi import Board
from trapline.machine.loader.bootparams import BootParams
from trapline.machine.loader.kernelimage import KernelImage, Piece

MIB = 1 << 20


def image(start=16 * MIB, size=48 * MIB, **changes):
    fields = {
        "kind": "vmlinux",
        "name": "vmlinux",
        "pieces": (Piece(start, memoryview(b"kernel"), size),),
        "entry": start,
        "start": start,
        "end": start + size,
        "setup_header": b"",
        "initrd_max": 0x7FFFFFFF,
        "cmdline_max": 2047,
    }
    return KernelImage(**{**fields, **changes})


def plan(**changes):
    fields = {
        "image": image(),
        "command_line": "console=ttyS0",
        "initrd": b"x" * 5000,
        "board": Board(),
    }
    return place.LoadPlan(**{**fields, **changes})


class FakeMemory:
    def __init__(self, size):
        self.ram = memoryview(bytearray(size))
        self.shared_ram = self.ram


class FakeVcpu:
    """Memory and the registers that the loader sets."""

    def __init__(self, memory):
        self.memory = FakeMemory(memory)
        self.regs = [1] * 17
        self.rflags = 0
        self.crs, self.msrs, self.segments = {}, {}, {}

    def set_cr(self, number, value):
        self.crs[number] = value

    def set_msr(self, index, value):
        self.msrs[index] = value

    def set_segment(self, name, value):
        self.segments[name] = value


# Memory map


def test_the_memory_map_covers_ram_once_and_in_order():
    ranges = e820.memory_map(512 * MIB)
    end = 0
    for entry in ranges:
        assert entry.start == end
        end = entry.start + entry.size
    assert end == 512 * MIB


# Zero page


def test_the_zero_page_of_a_vmlinux_has_a_made_header():
    page = BootParams(e820.memory_map(64 * MIB), 0xE0000, initrd=0x3000000, initrd_size=77).pack()
    assert len(page) == 4096
    assert page[0x202:0x206] == b"HdrS"
    assert struct.unpack_from("<H", page, 0x1FE) == (0xAA55,)
    assert struct.unpack_from("<II", page, 0x218) == (0x3000000, 77)
    assert struct.unpack_from("<Q", page, 0x70) == (0xE0000,)
    assert page[0x1E8] == 5
    assert struct.unpack_from("<QQI", page, 0x2D0 + 4 * 20) == (MIB, 63 * MIB, 1)


def test_the_header_of_a_boot_image_is_kept_but_for_what_the_loader_fills_in():
    header = bytearray(range(1, 0x7C))
    header[0x211 - 0x1F1] = 0x80
    page = BootParams((), 0, bytes(header), load_address=0x1000000).pack()
    assert page[0x1F1:0x210] == header[: 0x210 - 0x1F1]
    assert page[0x210] == 0xFF
    assert page[0x211] == 0x81
    assert struct.unpack_from("<I", page, 0x214) == (0x1000000,)


# EFI


def read_efi(tables):
    """Find the bitmap as arch/x86/boot/compressed/efi.c does."""
    base = gpamap.EFI_TABLES
    info = tables.info.pack()
    assert info[:4] == b"EL64"
    systab, size, version, memmap, length = struct.unpack_from("<IIIII", info, 4)
    assert version == 1
    at = systab - base
    signature, revision = struct.unpack_from("<QI", tables.data, at)
    assert signature.to_bytes(8, "little") == b"IBI SYST"
    assert revision >> 16 == 2
    count, config = struct.unpack_from("<QQ", tables.data, at + 104)
    entries = {}
    for index in range(count):
        offset = config - base + 24 * index
        guid = tables.data[offset : offset + 16]
        entries[guid] = struct.unpack_from("<Q", tables.data, offset + 16)[0]
    ranges = [
        struct.unpack_from("<IIQQQQ", tables.data, memmap - base + offset)
        for offset in range(0, length, size)
    ]
    return entries, ranges


def test_the_bitmap_is_found_through_the_system_table():
    tables = efi.tables(512 * MIB, 256 * MIB, 512 * MIB, 0xE0000)
    entries, ranges = read_efi(tables)
    guid = bytes.fromhex("3cded1d55c10f9449ea9bcef98120031")
    offset = entries[guid] - gpamap.EFI_TABLES
    version, unit, start, size = struct.unpack_from("<IIQQ", tables.data, offset)
    assert (version, unit, start, size) == (1, 2 * MIB, 256 * MIB, 16)
    assert tables.data[offset + 24 : offset + 24 + size] == b"\xff" * 16
    assert [(entry[2], entry[4] << 12) for entry in ranges if entry[0] == 15] == [
        (256 * MIB, 256 * MIB)
    ]


def test_the_efi_map_covers_ram_above_one_mib():
    _, ranges = read_efi(efi.tables(512 * MIB, 100 * MIB, 200 * MIB, 0))
    high = [(entry[0], entry[2], entry[4] << 12) for entry in ranges if entry[2] >= MIB]
    assert high == [(7, MIB, 99 * MIB), (15, 100 * MIB, 100 * MIB), (7, 200 * MIB, 312 * MIB)]


def test_bits_past_the_end_are_clear():
    table = efi.unaccepted_table(0, 6 * MIB)
    assert table[24:] == b"\x07" + bytes(7)


# Placement


def test_the_initrd_is_put_at_the_top_of_memory():
    where = place.plan_memory(plan(), 128 * MIB)
    assert where.initrd == 128 * MIB - 8192
    assert where.unaccepted == where.unaccepted_end == 128 * MIB


def test_the_initrd_stays_below_what_the_kernel_can_reach():
    where = place.plan_memory(plan(image=image(initrd_max=100 * MIB - 1)), 128 * MIB)
    assert where.initrd == 100 * MIB - 8192


def test_unaccepted_memory_is_the_end_of_ram_in_whole_units():
    where = place.plan_memory(plan(unaccepted=31 * MIB), 128 * MIB)
    assert (where.unaccepted, where.unaccepted_end) == (96 * MIB, 128 * MIB)
    assert where.initrd + 5000 <= where.unaccepted


@pytest.mark.parametrize(
    ("memory", "changes", "message"),
    [
        (16 * MIB, {}, "between 32 and 3072 MiB"),
        (4096 * MIB, {}, "between 32 and 3072 MiB"),
        (129 * MIB, {}, "multiple of 2 MiB"),
        (64 * MIB, {}, "need 65 MiB of accepted memory; give more with --memory"),
        (128 * MIB, {"unaccepted": 128 * MIB}, "leave less of it unaccepted"),
        (128 * MIB, {"initrd": bytes(70 * MIB)}, "need 134 MiB"),
    ],
)
def test_what_does_not_fit_is_refused(memory, changes, message):
    with pytest.raises(BadMachineError, match=message):
        place.plan_memory(plan(**changes), memory)


def test_load_fills_memory_and_starts_at_the_entry():
    vcpu = FakeVcpu(128 * MIB)
    where = place.load(vcpu, plan(unaccepted=32 * MIB))
    ram = vcpu.memory.ram
    assert ram[16 * MIB : 16 * MIB + 6] == b"kernel"
    assert ram[where.initrd : where.initrd + 5000] == b"x" * 5000
    assert bytes(ram[0x20000:0x2000E]) == b"console=ttyS0\0"
    assert bytes(ram[0xE0000:0xE0008]) == b"RSD PTR "
    assert bytes(ram[0x101C0:0x101C4]) == b"EL64"
    assert vcpu.regs[16] == 16 * MIB
    assert vcpu.regs[6] == 0x10000
    assert vcpu.crs[3] == gpamap.PAGE_TABLES
    assert vcpu.segments["cs"].selector == 0x10
    assert vcpu.segments["cs"].attributes & 0x20_0000  # 64-bit code


def test_the_command_line_must_fit():
    vcpu = FakeVcpu(128 * MIB)
    with pytest.raises(BadMachineError, match="3000 bytes; this kernel takes 2047"):
        place.load(vcpu, plan(command_line="x" * 3000))


# Page tables


@pytest.mark.parametrize("address", [0, 0x1234567, 0xFEE00000, (4 << 30) - 1])
def test_the_first_four_gibibytes_are_mapped_one_to_one(address):
    tables = cpustate.page_tables()

    def entry(table, index):
        value = struct.unpack_from("<Q", tables, table - gpamap.PAGE_TABLES + 8 * index)[0]
        assert value & 3 == 3
        return value

    directory = entry(gpamap.PAGE_TABLES, address >> 39) & -4096
    page_directory = entry(directory, address >> 30 & 511) & -4096
    leaf = entry(page_directory, address >> 21 & 511)
    assert leaf & 0x80
    assert leaf & -0x200000 == address & -0x200000
