"""Binaries that gcc builds: what each address belongs to, checked against other readers."""

import re
import struct
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import damaged, only_bad_image

import tiny_kernel
from trapline.base.errors import BadImageError
from trapline.kernel.binary import Binary
from trapline.kernel.dwarf.linetable import LineTable
from trapline.kernel.dwarf.symcache import SymCache
from trapline.kernel.dwarf.units import UnitTable
from trapline.kernel.elf.file import ElfFile
from trapline.kernel.elf.functions import source_name
from trapline.kernel.elf.relocate import MODULE_BASE, LinkedModule

DRIVERS = ["drivers/demo/demo.c", "drivers/demo/spill.c", "arch/x86/kernel/head_64.S"]


@pytest.fixture(scope="module", params=["dwarf-5", "dwarf-4"])
def vmlinux(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel")
    return tiny_kernel.build_vmlinux(folder, None, f"-g{request.param}")


@pytest.fixture(scope="module")
def ko(tmp_path_factory):
    return tiny_kernel.build_module(tmp_path_factory.mktemp("module"), "demo", DRIVERS)


def addr2line(path, addresses):
    """Ask binutils for the frames: [(function, file name, line), …] of each address."""
    output = subprocess.run(
        ["addr2line", "-afi", "-e", path, *map(hex, addresses)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    frames = []
    for line in output:
        if line.startswith("0x"):
            frames.append([])
        elif len(frames[-1]) == 0 or frames[-1][-1][1] is not None:
            frames[-1].append((line, None, None))
        else:
            file, number = re.match(r"(.*):(\d+|\?)", line).groups()
            name = frames[-1].pop()[0]
            frames[-1].append((name, file.rpartition("/")[2], int(number) if number != "?" else 0))
    return frames


def test_chains_agree_with_binutils(vmlinux):
    with Binary.open_vmlinux(vmlinux) as binary:
        addresses = [
            address
            for section in binary.text
            if section.name != ".altinstr_replacement"
            for address in range(section.address, section.end)
            if binary.symbol_at(address) is not None
        ]
        # types.c has BTF in place of DWARF.
        addresses = [a for a in addresses if inside_function(binary, a) and binary.unit_at(a)]
        assert len(addresses) > 200
        for address, theirs in zip(addresses, addr2line(vmlinux, addresses), strict=True):
            ours = [
                (frame.function, (frame.file or "").rpartition("/")[2], frame.line)
                for frame in binary.chain(address)
            ]
            if ours[-1][1].endswith(".S"):
                # binutils takes the last label for the function.
                assert ours[-1][1:] == theirs[-1][1:], hex(address)
            else:
                assert ours == theirs, hex(address)


def inside_function(binary, address):
    symbol = binary.symbol_at(address)
    return symbol.address <= address < symbol.address + symbol.size


def test_paths_objects_and_sections(vmlinux):
    with Binary.open_vmlinux(vmlinux) as binary:

        def at(name):
            return binary.address_of(name)

        assert binary.object_at(at("demo_poll")) == "drivers/demo/demo.o"
        assert binary.object_at(at("startup_64")) == "arch/x86/kernel/head_64.o"
        assert binary.section_at(at("demo_poll")) == ".text"
        assert binary.section_at(at("demo_halt")) == ".init.text"
        assert binary.section_at(at("quiet")) == ".noinstr.text"
        assert binary.object_at(0) is None
        assert binary.chain(0) == ()
        assert binary.read(at("pv_ops"), 8) == struct.pack("<Q", at("native_io_delay"))
        assert binary.read(0, 8) is None
        (alternative,) = [binary.alternatives.replacing_at(s.address) for s in binary.text[-1:]]
        assert alternative.origin == at("startup_64") + 4
        assert (alternative.feature, alternative.size, alternative.length) == (101, 2, 2)
        assert not alternative.inverted
        assert not alternative.direct


def test_all_parts_of_a_split_function_have_their_own_name(tmp_path):
    demo = """
        void panic(void) __attribute__((cold, noreturn, noinline));
        int split(int a) { if (__builtin_expect(a == 7, 0)) panic(); return a + 1; }
        void panic(void) { for (;;) asm volatile("hlt"); }
    """
    built = tiny_kernel.build_vmlinux(
        tmp_path, {"drivers/demo/demo.c": demo}, "-freorder-blocks-and-partition"
    )
    with Binary.open_vmlinux(built) as binary:
        cold = binary.functions.addresses_of(["split.cold"])
        assert list(cold.values()) == ["split.cold"]
        for address, name in ((next(iter(cold)), "split.cold"), (binary.address_of("split"),) * 2):
            expected = name if isinstance(name, str) else "split"
            assert binary.chain(address)[-1].function == expected
    assert source_name("split.cold") == "split"
    assert source_name("f.constprop.0.isra.2") == "f"
    assert source_name("a.b") == "a.b"


def test_code_whose_name_another_took_is_not_the_neighbours(tmp_path):
    """A weak function stays in the image, without a symbol, when a strong one is linked."""
    demo = """
        int before(int a) { return a + 1; }
        __attribute__((weak)) int notify(int a) { return a * 5 + 2; }
        int after(int a) { return a + 3; }
    """
    strong = "int notify(int a) { return a; }"
    sources = {"drivers/demo/demo.c": demo, "drivers/demo/strong.c": strong}
    built = tiny_kernel.build_vmlinux(tmp_path, sources)
    with Binary.open_vmlinux(built) as binary:
        before, after = binary.address_of("before"), binary.address_of("after")
        names = {binary.chain(at)[-1].function for at in range(before, after)}
        assert names == {"before", "notify"}
        assert not before < binary.address_of("notify") < after
        assert binary.object_at(binary.address_of("notify")) == "drivers/demo/strong.o"


def test_aliases(tmp_path):
    demo = """
        int __work(int a) { return a * 3; }
        int work(int a) __attribute__((alias("__work")));
    """
    built = tiny_kernel.build_vmlinux(tmp_path, {"drivers/demo/demo.c": demo})
    with Binary.open_vmlinux(built) as binary:
        address = binary.address_of("work")
        assert sorted(binary.functions.names_at(address)) == ["__work", "work"]
        assert binary.symbol_at(address + 1).name == "work"
        assert binary.addresses_of(["__work"]) == {address: "__work"}


@pytest.mark.parametrize("flags", [["-g"], ["-gz=zlib", "-g"], ["-gdwarf-4"], ["-gdwarf-5"]])
def test_a_module_links_as_ld_does(tmp_path, flags):
    """Relocated code, and DWARF, equal those of a real link at the same addresses."""
    ko = tiny_kernel.build_module(tmp_path, "demo", DRIVERS, None, *flags)
    with Binary.open_module("demo", ko) as binary:
        placed = " ".join(f"{s.name} {s.address:#x} : {{ *({s.name}) }}" for s in binary.text)
        externals = "\n".join(f"{name} = {at:#x};" for at, name in binary.externals.items())
        (tmp_path / "demo.lds").write_text(f"{externals}\nSECTIONS {{ {placed} }}")
        tiny_kernel.run(tmp_path, "ld", "-T", "demo.lds", "--no-relax", "-o", "linked", ko)
        linked = tmp_path / "linked"
        with ElfFile.open(linked) as elf:
            for section in binary.text:
                if section.name != ".altinstr_replacement":
                    assert bytes(section.data) == bytes(elf.contents(section.name)), section.name
        addresses = list(range(binary.text[0].address, binary.text[0].end))
        compared = 0
        for address, theirs in zip(addresses, addr2line(linked, addresses), strict=True):
            if inside_function(binary, address) and not theirs[-1][1].endswith(".S"):
                ours = [(f.function, f.line) for f in binary.chain(address)]
                assert ours == [(function, line) for function, _, line in theirs], hex(address)
                compared += 1
        assert compared > 100
        assert "ioread32" in binary.externals.values()
        assert binary.offset_of(binary.text[0].address + 5) == 5
        assert binary.object_at(binary.address_of("spill")) == "drivers/demo/spill.o"


def test_external_symbols_lie_apart(ko):
    with Binary.open_module("demo", ko) as binary:
        table = binary.address_of("pv_ops")
        assert not [a for a in binary.externals if table < a < table + 0x1000]
        assert binary.address_of("no_such_symbol") is None
        assert binary.addresses_of(["ioremap", "demo_poll"]) == {
            binary.address_of("ioremap"): "ioremap",
            binary.address_of("demo_poll"): "demo_poll",
        }


def test_a_debug_file_of_another_module_is_refused(tmp_path, ko):
    other = tiny_kernel.build_module(tmp_path, "other", ["drivers/demo/clean.c"])
    stripped = tmp_path / "stripped.ko"
    tiny_kernel.run(tmp_path, "objcopy", "--strip-debug", ko, stripped)
    tiny_kernel.run(tmp_path, "objcopy", "--only-keep-debug", other, tmp_path / "other.debug")
    with (
        Binary.open_module("demo", stripped, tmp_path / "other.debug") as binary,
        pytest.raises(BadImageError, match="does not belong to"),
    ):
        assert binary.symcache


# SymCache.


@pytest.fixture(scope="module")
def symcache_bytes(tmp_path_factory):
    path = tiny_kernel.build_vmlinux(tmp_path_factory.mktemp("kernel"))
    with Binary.open_vmlinux(path) as binary:
        return bytes(binary.symcache._blob), binary.text[0].address


def test_ranges_of_lists_what_chains_say(vmlinux):
    with Binary.open_vmlinux(vmlinux) as binary:
        names = {"readl", "writel", "kick"}
        listed = {
            address
            for start, end, name in binary.symcache.ranges_of(names)
            for address in range(start, end)
            if binary.chain(address)[0].function == name
        }
        expected = {
            address
            for section in binary.text
            for address in range(section.address, section.end)
            if (chain := binary.symcache.chain(address)) and chain[0].function in names
        }
        assert listed == expected
        assert expected
        outer = {
            address
            for instance in binary.symcache.inlined_spans(["kick"])
            for start, end in instance.spans
            for address in range(start, end)
        }
        # writel() is inlined into one of the two.
        assert outer & {a for a in expected if binary.chain(a)[0].function == "writel"}
        assert outer == {
            address
            for section in binary.text
            for address in range(section.address, section.end)
            if "kick" in {frame.function for frame in binary.symcache.chain(address)[:-1]}
        }
        assert binary.symcache.ranges_of(["no_such_function"]) == []


@settings(max_examples=200)
@given(data=st.data())
def test_any_symcache_ends_in_an_answer_or_a_bad_image(symcache_bytes, data):
    blob, base = symcache_bytes
    with only_bad_image():
        cache = SymCache(data.draw(damaged(blob, header=100)), base, "x")
        cache.ranges_of(["readl", "writel"])
        cache.inlined_spans(["kick", "readl"])
        for start in cache.starts[::7].tolist():
            cache.chain(start)


def test_another_version_of_the_format_is_refused(symcache_bytes):
    blob, base = symcache_bytes
    with pytest.raises(BadImageError, match="pinned version"):
        SymCache(blob[:4] + struct.pack("<I", 10) + blob[8:], base, "x")


def test_a_chain_without_end_is_refused(symcache_bytes):
    blob, base = symcache_bytes
    cache = SymCache(blob, base, "x")
    locations = np.array(cache._locations)
    locations[:, 3] = np.where(locations[:, 2] == 0xFFFFFFFF, 0xFFFFFFFF, np.arange(len(locations)))
    cache._locations = locations
    with pytest.raises(BadImageError, match="inconsistent"):
        cache.chain(int(cache.starts[0]))
    with pytest.raises(BadImageError, match="inconsistent"):
        cache.inlined_spans(["readl"])


# Hostile modules and debug sections.


@settings(max_examples=150)
@given(data=st.data())
def test_any_module_links_or_is_refused(ko, data):
    raw = data.draw(damaged(ko.read_bytes(), header=2000))
    with only_bad_image():
        elf = ElfFile.open(raw)
        module = LinkedModule(elf)
        for section in elf.sections:
            module.contents(section)
        ElfFile("debug", memoryview(module.debug_image))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("offset", 1 << 62, "outside"),
        ("offset", (1 << 64) - 1, "outside"),
        ("symbol", 0xFFFFFFF0, "symbol"),
        ("type", 200, "type 200"),
    ],
)
def test_relocations_out_of_bounds_are_refused(ko, field, value, message):
    raw = bytearray(ko.read_bytes())
    with ElfFile.open(bytes(raw)) as elf:
        table = elf.section(".rela.text")
        text = elf.section(".text")
    position = table.offset + {"offset": 0, "type": 8, "symbol": 12}[field]
    struct.pack_into("<Q" if field == "offset" else "<I", raw, position, value)
    module = LinkedModule(ElfFile.open(bytes(raw)))
    with pytest.raises(BadImageError, match=message):
        module.contents(text)


def test_sections_larger_than_any_module_are_refused(ko):
    raw = bytearray(ko.read_bytes())
    with ElfFile.open(bytes(raw)) as elf:
        header = struct.unpack_from("<Q", raw, 40)[0]
        bss = next(s for s in elf.sections if s.name == ".bss")
    struct.pack_into("<Q", raw, header + 64 * bss.index + 32, 1 << 30)
    with pytest.raises(BadImageError, match="larger than any module"):
        LinkedModule(ElfFile.open(bytes(raw)))


@settings(max_examples=300)
@given(data=st.data())
def test_any_line_table_and_unit_ends(vmlinux_sections, data):
    sections = dict(vmlinux_sections)
    victim = data.draw(st.sampled_from(sorted(sections)))
    sections[victim] = data.draw(damaged(sections[victim]))
    elf = FakeElf(sections)
    with only_bad_image():
        table = UnitTable(elf)
        for unit in table.units:
            if unit.line_table is not None:
                LineTable(elf, unit.line_table).at(MODULE_BASE)
        table.unit_at(0)


class FakeElf:
    """What UnitTable and LineTable ask of an ElfFile."""

    name = "fake"

    def __init__(self, sections):
        self._sections = sections

    def contents(self, name):
        return memoryview(self._sections.get(name, b""))


@pytest.fixture(scope="module")
def vmlinux_sections(vmlinux):
    with ElfFile.open(vmlinux) as elf:
        return {s.name: bytes(elf.contents(s)) for s in elf.sections if s.name.startswith(".debug")}
