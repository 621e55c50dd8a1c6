"""The list of loaded modules in guest memory: both layouts, sections, hostile lists."""

import struct
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trapline.kernel.binary import Binary
from trapline.kernel.live.modules import (
    MAX_MODULES,
    Area,
    LoadedModule,
    ModuleReader,
    module_spans,
)
from trapline.kernel.live.orc import OrcReg
from trapline.kernel.types.btf import Member

HEAD = 0xFFFFFFFF82D2EA00
FIRST = 0xFFFFFFFFC0100000
TEXT = 0xFFFFFFFFC0080000
SIZE = 0x2000


class Types:
    """struct module as of v6.4 or before, as small as can be."""

    def __init__(self, modern=True):
        arch = {"num_orcs": 0, "orc_unwind_ip": 8, "orc_unwind": 16}
        memory = {"base": 0, "size": 8} if modern else {}
        layout = {} if modern else {"base": 0, "size": 8, "text_size": 12}
        areas = {"mem": 96} if modern else {"core_layout": 96, "init_layout": 112}
        self.structs = {
            "module": {"list": 8, "name": 24, "arch": 200, **areas},
            "mod_arch_specific": arch,
            "module_memory": memory,
            "module_layout": layout,
        }
        self.modern = modern

    def struct(self, name):
        return {key: Member(at, "") for key, at in self.structs[name].items()} or None

    def size(self, name):
        return {"module_memory": 16}.get(name)

    def enum(self, name):
        known = {"mod_mem_type": {"MOD_TEXT": 0, "MOD_INIT_TEXT": 4}} if self.modern else {}
        return known.get(name)


class Memory:
    def __init__(self):
        self.bytes = {}

    def put(self, address, data):
        self.bytes.update((address + index, byte) for index, byte in enumerate(data))

    def read(self, address, size):
        if address not in self.bytes:
            return None
        return bytes(self.bytes.get(address + index, 0) for index in range(size))

    def module(self, address, name, *, link, modern=True, text=(TEXT, SIZE), init=(0, 0)):
        self.put(address, bytes(400))
        self.put(address + 8, struct.pack("<QQ", link, 0))
        self.put(address + 24, name)
        if modern:
            self.put(address + 96, struct.pack("<QI", *text))
            self.put(address + 96 + 4 * 16, struct.pack("<QI", *init))
        else:
            self.put(address + 96, struct.pack("<QII", text[0], text[1] * 2, text[1]))
            self.put(address + 112, struct.pack("<QII", init[0], init[1] * 2, init[1]))


@pytest.mark.parametrize("modern", [True, False])
def test_modules_are_listed_in_both_layouts(modern):
    memory = Memory()
    memory.put(HEAD, struct.pack("<Q", FIRST + 8))
    second = FIRST + 0x1000
    memory.module(FIRST, b"virtio_net\0", link=second + 8, modern=modern)
    memory.module(
        second, b"e1000\0", link=HEAD, modern=modern, text=(TEXT + SIZE, 0x100), init=(5 << 20, 64)
    )
    assert ModuleReader(memory.read, Types(modern), HEAD).read() == (
        LoadedModule("virtio_net", FIRST, Area(TEXT, SIZE), None),
        LoadedModule("e1000", second, Area(TEXT + SIZE, 0x100), Area(5 << 20, 64)),
    )


def test_the_kernels_own_orc_table_is_read():
    memory = Memory()
    memory.put(HEAD, struct.pack("<Q", FIRST + 8))
    memory.module(FIRST, b"m\0", link=HEAD)
    memory.put(FIRST + 200, struct.pack("<QQQ", 1, TEXT + 0x4000, TEXT + 0x5000))
    memory.put(TEXT + 0x4000, struct.pack("<i", -0x4000))
    memory.put(TEXT + 0x5000, struct.pack("<hhH", 24, 0, 5 | 2 << 8))
    reader = ModuleReader(memory.read, Types(), HEAD)
    (module,) = reader.read()
    entry = reader.orc(module, 3).find(TEXT + 4)
    assert (entry.sp_offset, entry.sp_reg) == (24, OrcReg.SP)
    assert reader.orc(module, 4).find(TEXT + 4).sp_reg == OrcReg.DI
    memory.put(FIRST + 200, struct.pack("<Q", 1 << 31))
    assert reader.orc(module, 3) is None


def test_a_list_in_a_circle_ends():
    memory = Memory()
    memory.put(HEAD, struct.pack("<Q", FIRST + 8))
    memory.module(FIRST, b"m\0", link=FIRST + 8)
    assert len(ModuleReader(memory.read, Types(), HEAD).read()) == 1


def test_an_endless_list_is_cut():
    def read(address, size):
        if size == 8 and (address & 0xFFF) == 8:
            return struct.pack("<Q", address + 0x1000)
        return {4: struct.pack("<I", 64), 56: b"m" + bytes(55)}.get(size, b"\1" * size)

    modules = ModuleReader(read, Types(), FIRST + 8).read()
    assert len(modules) == MAX_MODULES


@pytest.mark.parametrize("name", [b"\0", b"a b\0", b"\x1b[31m\0", b"x" * 56, b"../etc\0"])
def test_a_name_that_is_none_ends_the_list(name):
    memory = Memory()
    memory.put(HEAD, struct.pack("<Q", FIRST + 8))
    memory.module(FIRST, name, link=HEAD)
    assert ModuleReader(memory.read, Types(), HEAD).read() == ()


def test_a_kernel_without_the_types_has_no_modules():
    types = Types()
    types.structs["module"] = {}
    reader = ModuleReader(Memory().read, types, HEAD)
    assert not reader.usable
    assert reader.read() == ()


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_no_memory_breaks_the_walk(data):
    def read(address, size):
        assert 0 <= address <= 2**64 - size
        return data.draw(st.one_of(st.none(), st.binary(min_size=size, max_size=size)))

    ModuleReader(read, Types(), HEAD).read()


@pytest.fixture
def built(tmp_path):
    """A module file with the sections that objtool and modpost leave behind."""
    source = tmp_path / "m.s"
    source.write_text(
        """
        .globl probe, setup, leave
        .text
        .balign 64
        probe: .fill 100, 1, 0x90
        .type probe, @function
        .size probe, 100
        .section .data, "aw"
        .quad 1
        .section .init.text, "ax"
        .balign 16
        setup: .fill 32, 1, 0x90
        .section .exit.text, "ax"
        .balign 32
        leave: .fill 8, 1, 0x90
        .type leave, @function
        .size leave, 8
        """
    )
    subprocess.run(["as", "-o", tmp_path / "m.ko", source], check=True)
    with Binary.open_module("m", tmp_path / "m.ko") as binary:
        yield binary


def test_sections_are_laid_out_as_the_kernel_does(built):
    module = LoadedModule("m", FIRST, Area(TEXT, SIZE), Area(TEXT + 0x10000, 0x100))
    linked = {part.name: part.address for part in built.text}
    assert [tuple(span) for span in module_spans(built, module)] == [
        (TEXT, 100, linked[".text"]),
        (TEXT + 128, 8, linked[".exit.text"]),
        (TEXT + 0x10000, 32, linked[".init.text"]),
    ]


def test_sections_that_do_not_fit_are_of_another_build(built):
    module = LoadedModule("m", FIRST, Area(TEXT, 0x70), None)
    assert [span.size for span in module_spans(built, module)] == [100]
