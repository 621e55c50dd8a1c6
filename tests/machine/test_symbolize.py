"""Finding the kernel in guest memory, and what gdb is told of it."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from trapline.cpu.engine import Reg, SegmentRegister
from trapline.kernel.binary import Binary
from trapline.kernel.find.kernelfiles import ModuleFile
from trapline.kernel.live.modules import Area, LoadedModule, ModuleReader
from trapline.kernel.live.runtime import KERNEL_MAP, PHYSICAL_ALIGN
from trapline.kernel.types.btf import Btf, Member
from trapline.machine.gdb.debugview import TdTarget
from trapline.machine.observe.symbols import GuestSymbols

SLIDE = 9 * PHYSICAL_ALIGN
GPA_OF_MAP = 3 * PHYSICAL_ALIGN
MODULE = 0xFFFFFFFFC0400000

KERNEL = """
    .globl main, linux_banner, modules
    .text
main: call inner
    hlt
    .type main, @function
    .size main, . - main
inner: ret
    .type inner, @function
    .size inner, . - inner
    .section .rodata
linux_banner: .asciz "Linux version 6.12.0-test (gcc) #1 SMP PREEMPT_DYNAMIC a very long one"
    .data
modules: .quad 0
    .section .BTF
    .byte 1
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "k.s").write_text(KERNEL)
    (folder / "m.s").write_text(
        ".text\n.globl probe\nprobe: ret\n.type probe,@function\n.size probe,1\n"
    )
    for name in ("k", "m"):
        subprocess.run(["as", "-o", folder / f"{name}.o", folder / f"{name}.s"], check=True)
    subprocess.run(
        [
            "ld",
            "-Ttext",
            "0xffffffff81000000",
            "-e",
            "main",
            "-o",
            folder / "vmlinux",
            folder / "k.o",
        ],
        check=True,
    )
    return folder


SHARED = 1 << 39


class Guest:
    """A VCPU whose memory is a vmlinux at a slide."""

    def __init__(self, vmlinux, slide):
        self.memory = SimpleNamespace(shared_bit=SHARED)
        self.vmlinux = vmlinux
        self.slide = slide
        self.regs = [0] * 17
        self.rflags, self.cpl = 2, 0
        self.reads = 0

    def read(self, gla, size):
        self.reads += 1
        if self.slide is None:
            return None
        return self.vmlinux.read(gla - self.slide, size)

    def translate(self, gla):
        return SHARED | (gla - self.slide - KERNEL_MAP + GPA_OF_MAP)

    def segment(self, name):
        return SegmentRegister({"cs": 0x10, "ss": 0x18}[name], 0, 0, 0)


@pytest.fixture
def vmlinux(files):
    with Binary.open_vmlinux(files / "vmlinux") as binary:
        yield binary


@pytest.fixture
def loaded(monkeypatch):
    """Replace the walk of guest memory, which has its own tests."""
    modules = []
    monkeypatch.setattr(Btf, "parse", lambda _: NoTypes())
    monkeypatch.setattr(ModuleReader, "read", lambda _: tuple(modules))
    monkeypatch.setattr(ModuleReader, "orc", lambda *_: None)
    return modules


class NoTypes:
    def struct(self, name):
        return {name: Member(0, "")}

    def size(self, name):
        del name

    def enum(self, name):
        del name


def test_the_kernel_is_found_at_its_slide(vmlinux, loaded):
    guest = Guest(vmlinux, SLIDE)
    symbols = GuestSymbols(guest, vmlinux)
    main = vmlinux.address_of("main")
    assert symbols.slide is None
    assert symbols.locate(main + SLIDE).label == "main+0x0/0x6"
    assert symbols.slide == SLIDE
    assert symbols.locate(main - KERNEL_MAP + GPA_OF_MAP + 6).label == "inner+0x0/0x1"
    assert not loaded


def test_an_address_that_nothing_explains_is_looked_into_once(vmlinux, loaded):
    guest = Guest(vmlinux, SLIDE)
    symbols = GuestSymbols(guest, vmlinux)
    assert symbols.locate(MODULE).label == f"{MODULE:#x}"
    reads = guest.reads
    symbols.locate(MODULE)
    assert guest.reads == reads
    assert not loaded


def test_low_addresses_never_start_a_search(vmlinux):
    guest = Guest(vmlinux, SLIDE)
    symbols = GuestSymbols(guest, vmlinux)
    symbols.place_decompressor(0x100000, 0x1000)
    assert symbols.locate(0x100010).label == "decompressor+0x10"
    assert symbols.locate(0x5).label == "0x5"
    assert guest.reads == 0


def test_modules_are_picked_up_when_one_of_their_addresses_turns_up(vmlinux, loaded, files):
    module = ModuleFile("m", files / "m.o", None, "kernel/m.ko")
    symbols = GuestSymbols(Guest(vmlinux, SLIDE), vmlinux, modules=[module])
    symbols.refresh()
    loaded.append(LoadedModule("m", 0, Area(MODULE, 0x1000), None))
    loaded.append(LoadedModule("stranger", 0, Area(MODULE + 0x2000, 0x1000), None))
    assert symbols.locate(MODULE).label == "probe+0x0/0x1 [m]"
    assert symbols.locate(MODULE + 0x2010).label == f"{MODULE + 0x2010:#x} [stranger]"
    assert list(symbols.module_text()) == [(module, MODULE)]
    symbols.close()


def test_a_damaged_module_file_costs_only_its_names(vmlinux, loaded, tmp_path):
    (tmp_path / "m.ko").write_bytes(b"\x7fELF")
    module = ModuleFile("m", tmp_path / "m.ko", None, "kernel/m.ko")
    symbols = GuestSymbols(Guest(vmlinux, SLIDE), vmlinux, modules=[module])
    loaded.append(LoadedModule("m", 0, Area(MODULE, 0x1000), None))
    assert symbols.locate(MODULE).label == f"{MODULE:#x} [m]"


def test_without_a_vmlinux_addresses_stay_bare():
    symbols = GuestSymbols(Guest(None, None), None)
    symbols.refresh()
    assert symbols.locate(MODULE).label == f"{MODULE:#x}"


def test_gdb_is_told_where_to_load_symbols(vmlinux, loaded, files):
    module = ModuleFile("m", files / "m.o", files / "m.debug", "kernel/m.ko")
    symbols = GuestSymbols(Guest(vmlinux, SLIDE), vmlinux, modules=[module])
    target = TdTarget(symbols._vcpu, symbols, lambda count: ["trap"] * count, Path("/k/vmlinux"))
    (files / "m.debug").write_bytes((files / "m.o").read_bytes())
    loaded.append(LoadedModule("m", 0, Area(MODULE, 0x1000), None))
    assert target.placement()[1:] == [
        f"symbol-file /k/vmlinux -o {SLIDE:#x}",
        f"add-symbol-file {files}/m.debug {MODULE:#x}",
    ]
    assert target.recent_traps(2) == ["trap", "trap"]


def test_gdb_is_told_when_there_is_no_kernel_yet(vmlinux):
    guest = Guest(vmlinux, None)
    symbols = GuestSymbols(guest, vmlinux)
    target = TdTarget(guest, symbols, lambda _: [], None)
    assert target.placement() == [
        "the kernel does not run at its own addresses yet; ask again later"
    ]
    guest.regs[Reg.RIP] = 0x1234
    assert target.backtrace()[0] == " 0x1234"
