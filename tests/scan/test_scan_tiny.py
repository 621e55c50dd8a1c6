"""Scans of tiny kernels: what is planted is found, its twin without the fault is clean."""

from collections import Counter
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_kernel
from trapline.allowlist.listfile import load
from trapline.base.errors import BadImageError, KernelNotFoundError, TraplineError
from trapline.kernel.elf.file import ElfFile
from trapline.kernel.find.kernelfiles import KernelFiles, ModuleFile
from trapline.linux import ve_handler
from trapline.linux.accessors import CALLED, PARAVIRT
from trapline.scan.kernelfacts import ScanContext
from trapline.scan.objects import Task, scan_object
from trapline.scan.verdicts import of_call
from trapline.scan.wholekernel import scan


def files(vmlinux=None, modules=(), **rest):
    return KernelFiles("6.12.0", vmlinux, None, tuple(modules), **rest)


def module(path, debug="same", name=None):
    name = name or path.name.partition(".")[0]
    return ModuleFile(name, path, path if debug == "same" else debug, f"kernel/drivers/{name}.ko")


def of(result, function):
    return [site for site in result.sites if site.function == function]


def briefly(site):
    return (site.trap, site.form, site.access, site.width, site.accessor)


@pytest.fixture(scope="module")
def vmlinux(tmp_path_factory):
    return tiny_kernel.build_vmlinux(tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="module")
def result(vmlinux):
    return scan(files(vmlinux), load(), workers=1)


def test_inlined_accessors_are_mmio_with_chain_and_line(result):
    write, read = of(result, "demo_poll")
    assert briefly(write) == ("mmio", "instruction", "write", 4, "writel")
    assert briefly(read) == ("mmio", "instruction", "read", 4, "readl")
    assert [frame.function for frame in write.inlined] == ["writel", "kick"]
    assert [frame.file for frame in write.inlined] == [
        "arch/x86/include/asm/io.h",
        "drivers/demo/demo.c",
    ]
    assert (write.file, write.object) == ("drivers/demo/demo.c", "drivers/demo/demo.o")
    source = tiny_kernel.SOURCES["drivers/demo/demo.c"].splitlines()
    assert "kick(d, v);" in source[write.line - 1]
    assert "readl(d->base)" in source[read.line - 1]
    assert write.instruction.startswith("mov ")
    assert write.emulable
    assert "MOV m,r" in write.reason


def test_dwarf_4_gives_the_same_sites(result, tmp_path):
    def told(site):
        return (
            site.trap,
            site.form,
            site.access,
            site.width,
            site.function,
            site.object,
            site.line,
        )

    older = scan(files(tiny_kernel.build_vmlinux(tmp_path, None, "-gdwarf-4")), load(), workers=1)
    assert Counter(map(told, older.sites)) == Counter(map(told, result.sites))


def test_the_twin_on_ordinary_memory_is_clean(result):
    assert of(result, "clean_poll") == []
    assert of(result, "clean_constant") == []
    assert not [site for site in result.sites if site.object == "drivers/demo/clean.o"]


def test_spills_and_other_loads_are_not_the_access(result):
    assert of(result, "spill") == []
    (wide,) = of(result, "wide")
    assert briefly(wide) == ("mmio", "instruction", "read", 8, "readq")


def test_memory_mapped_pci_configuration_is_mmio(tmp_path):
    # As arch/x86/include/asm/pci_x86.h has them: the address in a register, the value in AX.
    ecam = """
        static inline unsigned char mmio_config_readb(void *pos) { unsigned char val;
            asm volatile("movb (%1),%%al" : "=a" (val) : "r" (pos)); return val; }
        static inline void mmio_config_writel(void *pos, unsigned int val) {
            asm volatile("movl %%eax,(%1)" : : "a" (val), "r" (pos) : "memory"); }
        unsigned int pci_mmcfg_read(void *base, unsigned int *value) {
            return *value = mmio_config_readb(base + 256); }
        void pci_mmcfg_write(void *base, unsigned int *value) {
            mmio_config_writel(base + 256, *value); }
        unsigned int plain_read(unsigned int *base, unsigned int *value) {
            return *value = base[64]; }
    """
    vmlinux = tiny_kernel.build_vmlinux(tmp_path, {"arch/x86/pci/mmconfig_64.c": ecam})
    result = scan(files(vmlinux), load(), workers=1)
    (read,), (write,) = of(result, "pci_mmcfg_read"), of(result, "pci_mmcfg_write")
    assert briefly(read) == ("mmio", "instruction", "read", 1, "mmio_config_readb")
    assert briefly(write) == ("mmio", "instruction", "write", 4, "mmio_config_writel")
    assert {read.subsystem, write.subsystem} == {"PCI configuration"}
    assert of(result, "plain_read") == []


def test_wide_accesses_are_mmio_and_refused(tmp_path):
    # As arch/x86/include/asm/special_insns.h and drivers/gpu/drm/drm_cache.c have them; the first
    # two name what they write in a register operand.
    wide = """
        struct line { char bytes[64]; };
        static inline void movdir64b(void *dst, const void *src) {
            asm volatile(".byte 0x66, 0x0f, 0x38, 0xf8, 0x02" : "+m" (*(struct line *)dst)
                : "m" (*(struct line *)src), "a" (dst), "d" (src)); }
        static inline void movdir64b_io(void *dst, const void *src) { movdir64b(dst, src); }
        static inline int enqcmds(void *dst, const void *src) { _Bool full;
            asm volatile(".byte 0xf3, 0x0f, 0x38, 0xf8, 0x02" : "=@ccz" (full),
                "+m" (*(struct line *)dst) : "m" (*(struct line *)src), "a" (dst), "d" (src));
            return full; }
        static inline void __memcpy_ntdqa(void *dst, const void *src) {
            asm volatile("movntdqa (%0),%%xmm0; movaps %%xmm0,(%1)" : : "r" (src), "r" (dst)
                : "memory"); }
        void submit(void *portal, const void *descriptor) { movdir64b_io(portal, descriptor); }
        int submit_shared(void *portal, const void *descriptor) {
            return enqcmds(portal, descriptor); }
        void read_back(void *memory, const void *aperture) { __memcpy_ntdqa(memory, aperture); }
        void clear(void *memory, const void *zeros) { movdir64b(memory, zeros); }
    """
    vmlinux = tiny_kernel.build_vmlinux(tmp_path, {"drivers/demo/wide.c": wide})
    result = scan(files(vmlinux), load(), workers=1)
    queue, shared, aperture = (
        site
        for function in ("submit", "submit_shared", "read_back")
        for site in of(result, function)
    )
    assert briefly(queue) == ("mmio", "instruction", "write", 64, "movdir64b")
    assert briefly(shared) == ("mmio", "instruction", "write", 64, "enqcmds")
    assert briefly(aperture) == ("mmio", "instruction", "read", 16, "__memcpy_ntdqa")
    assert queue.instruction.startswith("movdir64b ")
    assert shared.instruction.startswith("enqcmds ")
    assert aperture.instruction.startswith("movntdqa ")
    for site in (queue, shared, aperture):
        assert not site.emulable
        assert site.reason.startswith("insn_decode_mmio() has no case for ")
    assert of(result, "clear") == []


def test_big_endian_accesses_in_two_halves_are_calls_of_accessors(tmp_path):
    source = """
        unsigned long ioread64be_lo_hi(const void *a);
        void iowrite64be_hi_lo(unsigned long v, void *a);
        void halves(void *a) { iowrite64be_hi_lo(ioread64be_lo_hi(a), a); }
    """
    library = """
        unsigned long ioread64be_lo_hi(const void *a) { return (unsigned long)a; }
        void iowrite64be_hi_lo(unsigned long v, void *a) { asm volatile("" : : "r" (v), "r" (a)); }
    """
    replaced = {"drivers/demo/halves.c": source, "lib/halves.c": library}
    result = scan(files(tiny_kernel.build_vmlinux(tmp_path, replaced)), load(), workers=1)
    assert [briefly(site) for site in of(result, "halves")] == [
        ("mmio", "call", "read", 8, "ioread64be_lo_hi"),
        ("mmio", "call", "write", 8, "iowrite64be_hi_lo"),
    ]


# A function whose stack is aligned first has 26 bytes before its frame is set up.
@pytest.mark.parametrize("before", [0, 26])
def test_the_frame_of_unoptimised_code_is_not_a_device(tmp_path, before):
    padding = f"-fpatchable-function-entry={before}"
    sites = scan(files(tiny_kernel.build_vmlinux(tmp_path, None, "-O0", padding)), load()).sites
    # Out of line, each accessor loads its arguments from the frame, and its result.
    copies = [site for site in sites if site.function in {"readl", "writel", "readq", "writeb"}]
    assert {site.function for site in copies} == {"readl", "writel", "readq", "writeb"}
    assert not [site for site in copies if "%rbp" in site.instruction]
    per_copy = Counter((site.function, site.object) for site in copies)
    assert set(per_copy.values()) == {1}


def test_names_from_a_hostile_file_do_not_reach_a_terminal(tmp_path):
    demo = tiny_kernel.SOURCES["drivers/demo/demo.c"]
    vmlinux = tiny_kernel.build_vmlinux(tmp_path, {"drivers/demo/demo.c": demo})
    raw = vmlinux.read_bytes()
    assert raw.count(b"demo_poll") >= 2  # symbol table and DWARF
    vmlinux.write_bytes(raw.replace(b"demo_poll", b"\x1b]0;x\x07\n!!").replace(b"kick", b"\x1b[2J"))
    sites = scan(files(vmlinux), load(), workers=1).sites
    names = {frame.function for site in sites for frame in site.inlined}
    names |= {site.function for site in sites}
    assert any("x1b" in name for name in names)
    assert all(name.isprintable() for name in names)


def test_calls_of_accessors_and_opcodes(result):
    assert [briefly(site) for site in of(result, "demo_config")] == [
        ("mmio", "call", "write", 1, "iowrite8"),
        ("mmio", "call", "read", 4, "ioread32"),
        ("pio", "instruction", "write", 1, None),
        ("pio", "instruction", "read", 4, None),
    ]
    assert of(result, "demo_config")[0].instruction == "call iowrite8"
    assert [briefly(site)[0] for site in of(result, "demo_id")] == ["cpuid"]
    (halt,) = of(result, "demo_halt")
    assert (halt.trap, halt.section) == ("hlt", ".init.text")


def test_calls_that_change_bits_of_the_pci_configuration(tmp_path):
    access = """
        void pci_clear_and_set_config_dword(void *dev, int pos, int clear, int set) {
            asm volatile("" : : "r" (dev), "r" (pos), "r" (clear), "r" (set)); }
        int raw_pci_read(int bus, int reg, unsigned int *value) {
            asm volatile("" : : "r" (value)); return bus + reg; }
    """
    caller = """
        void pci_clear_and_set_config_dword(void *dev, int pos, int clear, int set);
        int raw_pci_read(int bus, int reg, unsigned int *value);
        int aspm(void *dev, unsigned int *value) {
            pci_clear_and_set_config_dword(dev, 4, 1, 2); return raw_pci_read(0, 4, value) + 1; }
    """
    added = {"drivers/pci/access.c": access, "drivers/pci/pcie/aspm.c": caller}
    result = scan(files(tiny_kernel.build_vmlinux(tmp_path, added)), load(), workers=1)
    assert [briefly(site) for site in of(result, "aspm")] == [
        ("pio", "call", "read-write", 4, "pci_clear_and_set_config_dword"),
        ("pio", "call", "read", 0, "raw_pci_read"),
    ]
    assert all(site.emulable for site in of(result, "aspm"))


@pytest.mark.parametrize("called", sorted({*CALLED.values(), *PARAVIRT.values()}, key=repr))
def test_each_accessor_has_a_verdict(called):
    assert of_call(called, ve_handler.UPSTREAM).reason.startswith("it ends in a trap: ")


def test_calls_of_the_copy_that_is_a_string_move_are_refused():
    copies = {name: of_call(CALLED[name], ve_handler.UPSTREAM, name) for name in CALLED}
    refused = {name for name in copies if CALLED[name].trap == "mmio" and not copies[name].emulable}
    assert refused == {"__iowrite32_copy"}
    assert "handle_mmio() refuses MOVS" in copies["__iowrite32_copy"].reason


def test_paravirt_calls_are_named_from_the_types_of_the_kernel(result):
    # PV(8) is `save`, which hides no trap.
    (hidden,) = of(result, "demo_hidden")
    assert briefly(hidden) == ("msr", "paravirt", "read", 8, "pv_ops.cpu.read_msr")


def test_paravirt_calls_are_named_by_their_targets_without_types(tmp_path):
    vmlinux = tiny_kernel.build_vmlinux(tmp_path)
    tiny_kernel.run(tmp_path, "objcopy", "--remove-section=.BTF", vmlinux)
    (hidden,) = of(scan(files(vmlinux), load(), workers=1), "demo_hidden")
    assert hidden.accessor == "pv_ops.cpu.read_msr"


def test_string_moves_are_refused_with_the_direction_of_the_copy(result):
    (copy,) = of(result, "memcpy_fromio")
    assert briefly(copy) == ("mmio", "instruction", "read", 4, "rep_movs")
    assert not copy.emulable


def test_what_the_handler_of_this_kernel_cannot_decode_is_refused(result):
    # The enumeration in types.c lacks READ_ZERO_EXTEND and MOVS, and has READ.
    (read,) = of(result, "ioread32")
    assert read.emulable


def test_a_kernel_without_a_handler_refuses_all(tmp_path):
    types = tiny_kernel.SOURCES["arch/x86/kernel/types.c"]
    plain = types.replace("void tdx_handle_virt_exception(void) { }", "")
    built = tiny_kernel.build_vmlinux(tmp_path, {"arch/x86/kernel/types.c": plain})
    sites = scan(files(built), load(), workers=1).sites
    assert sites
    assert not any(site.emulable for site in sites)


def test_replacement_code_belongs_to_its_origin(result):
    outb, cpuid = of(result, "startup_64")
    assert (outb.section, outb.origin, outb.file) == (".text", None, "arch/x86/kernel/head_64.S")
    assert (cpuid.trap, cpuid.section) == ("cpuid", ".altinstr_replacement")
    assert int(cpuid.origin, 16) == int(outb.address, 16) + 2
    lines = tiny_kernel.SOURCES["arch/x86/kernel/head_64.S"].splitlines()
    assert "outb %al, $0x80" in lines[outb.line - 1]
    assert "0:  nop" in lines[cpuid.line - 1]


def test_parts_of_the_text_keep_their_section(result):
    (quiet,) = of(result, "quiet")
    assert quiet.section == ".noinstr.text"


def test_mappings_are_listed(result):
    (mapping,) = result.mappings
    assert (mapping.mapper, mapping.function) == ("ioremap", "demo_probe")
    assert mapping.object == "drivers/demo/demo.o"


def test_the_document_is_whole(result):
    assert result.coverage.complete
    assert result.kernel.has_dwarf
    assert result.kernel.release == "6.12.0"
    assert len({site.id for site in result.sites}) == len(result.sites)
    forms = Counter(f"{site.trap}.{site.form}" for site in result.sites)
    assert {key: result.counts[key] for key in forms} == dict(forms)
    assert result.counts["sites"] == len(result.sites)
    assert all(site.subsystem for site in result.sites)


def test_ids_survive_a_rebuild_at_other_addresses_and_lines(tmp_path, result):
    demo = tiny_kernel.SOURCES["drivers/demo/demo.c"]
    moved = "\n\nint before(int a) { return a * 7; }\n" + demo
    other = scan(files(tiny_kernel.build_vmlinux(tmp_path, {"drivers/demo/demo.c": moved})), load())
    assert {site.id for site in other.sites} == {site.id for site in result.sites}
    old = {site.id: (site.address, site.line) for site in result.sites}
    new = {site.id: (site.address, site.line) for site in other.sites}
    assert old != new


def test_a_new_access_is_the_only_new_id(tmp_path, result):
    demo = tiny_kernel.SOURCES["drivers/demo/demo.c"]
    grown = demo.replace("return d->saved[1];", "writel(9, d->base + 32); return d->saved[1];")
    other = scan(files(tiny_kernel.build_vmlinux(tmp_path, {"drivers/demo/demo.c": grown})), load())
    new = {site.id for site in other.sites} - {site.id for site in result.sites}
    assert len(new) == 1
    assert {site.id for site in result.sites} <= {site.id for site in other.sites}


# Modules.


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    demo = tiny_kernel.build_module(folder, "demo", ["drivers/demo/demo.c"])
    clean = tiny_kernel.build_module(folder, "clean", ["drivers/demo/clean.c"])
    return demo, clean


def test_a_module_has_the_sites_of_the_built_in_driver(vmlinux, modules, result):
    found = scan(files(vmlinux, map(module, modules)), load())
    built_in = {site.id: site for site in result.sites if site.object == "drivers/demo/demo.o"}
    loadable = [site for site in found.sites if site.module == "demo"]
    assert [site.function for site in loadable] == [s.function for s in built_in.values()]
    assert [site.instruction for site in loadable[:2]] == [
        site.instruction for site in list(built_in.values())[:2]
    ]
    assert not [site for site in found.sites if site.module == "clean"]
    assert [mapping.mapper for mapping in found.mappings if mapping.module == "demo"] == ["ioremap"]


def test_addresses_of_a_module_are_offsets_in_its_sections(vmlinux, modules):
    found = scan(files(vmlinux, [module(modules[0])]), load())
    sites = [s for s in found.sites if s.module == "demo" and s.form == "instruction"]
    assert {site.section for site in sites} == {".text", ".init.text"}
    with ElfFile.open(modules[0]) as elf:
        for site in sites:
            code = bytes(elf.contents(site.section))[int(site.address, 16) :]
            assert code.hex().startswith(site.bytes)


def test_the_result_does_not_depend_on_the_number_of_processes(vmlinux, modules):
    one = scan(files(vmlinux, map(module, modules)), load(), workers=1)
    three = scan(files(vmlinux, map(module, modules)), load(), workers=3)
    assert msgspec.json.encode(one) == msgspec.json.encode(three)


def test_progress_counts_objects(vmlinux, modules):
    steps = []
    scan(
        files(vmlinux, map(module, modules)),
        load(),
        lambda done, total: steps.append((done, total)),
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("keep_code", [True, False])
def test_separate_debug_files(tmp_path, vmlinux, modules, keep_code):
    stripped, debug = tmp_path / "demo.ko", tmp_path / "demo.ko.debug"
    tiny_kernel.run(tmp_path, "objcopy", "--strip-debug", modules[0], stripped)
    if keep_code:
        debug.write_bytes(modules[0].read_bytes())
    else:
        tiny_kernel.run(tmp_path, "objcopy", "--only-keep-debug", modules[0], debug)
    whole = scan(files(vmlinux, [module(modules[0])]), load())
    split = scan(files(vmlinux, [module(stripped, debug)]), load())
    assert split.coverage.complete
    assert split.sites == whole.sites


# Without debug information.


def test_without_dwarf_all_but_inlined_mmio_is_seen(tmp_path, vmlinux, result):
    bare = tmp_path / "vmlinux"
    tiny_kernel.run(tmp_path, "objcopy", "--strip-debug", vmlinux, bare)
    found = scan(files(bare, missing=("Install linux-image-dbg.",)), load())
    assert not found.coverage.complete
    assert "no debug information" in found.coverage.missing[0]
    assert found.coverage.advice == ("Install linux-image-dbg.",)

    def rest(document):
        return [
            (site.address, *briefly(site)[:4])
            for site in document.sites
            if (site.trap, site.form) != ("mmio", "instruction")
        ]

    assert rest(found) == rest(result)
    assert {site.function for site in found.sites} >= {"demo_config", "startup_64"}
    assert [mapping.mapper for mapping in found.mappings] == ["ioremap"]


def test_without_symbols_opcodes_are_seen(tmp_path, vmlinux, result):
    bare = tmp_path / "vmlinux"
    tiny_kernel.run(tmp_path, "objcopy", "--strip-all", vmlinux, bare)
    found = scan(files(bare), load())
    opcodes = [site.address for site in result.sites if site.form == "instruction"]
    assert {site.address for site in found.sites} <= set(opcodes)
    assert "cpuid" in {site.trap for site in found.sites}
    assert "neither debug information nor symbols" in found.coverage.missing[0]


# Bad input.


def test_a_corrupt_module_is_named_and_the_rest_is_scanned(tmp_path, vmlinux, modules):
    broken = tmp_path / "broken.ko"
    broken.write_bytes(modules[0].read_bytes()[:700])
    found = scan(files(vmlinux, [module(broken), module(modules[0])]), load())
    assert not found.coverage.complete
    (text,) = found.coverage.missing
    assert text.startswith("Module broken was not scanned: ")
    assert "demo" in {site.module for site in found.sites}


def test_a_corrupt_vmlinux_is_an_error(tmp_path, vmlinux):
    broken = tmp_path / "vmlinux"
    broken.write_bytes(vmlinux.read_bytes()[:3000])
    with pytest.raises(BadImageError):
        scan(files(broken), load())


def test_nothing_to_scan_is_an_error():
    with pytest.raises(KernelNotFoundError):
        scan(files(), load())


@settings(max_examples=60)
@given(data=st.data())
def test_any_damaged_object_ends_in_a_result_or_one_sentence(tmp_path_factory, data, damaged_from):
    kind, sound = data.draw(st.sampled_from(damaged_from))
    raw = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "object"
    path.write_bytes(raw)
    context = ScanContext(paravirt={16: "cpu.read_msr"}, handler=ve_handler.UPSTREAM)
    with suppress(TraplineError):
        scan_object(Task(name="x", kind=kind, path=str(path)), context)


@pytest.fixture(scope="module")
def damaged_from(vmlinux, modules):
    return [("vmlinux", vmlinux.read_bytes()), ("module", modules[0].read_bytes())]


def test_split_dwarf_is_said_and_is_not_whole(tmp_path):
    vmlinux = tiny_kernel.build_vmlinux(tmp_path, None, "-gsplit-dwarf")
    coverage = scan(files(vmlinux), load(), workers=1).coverage
    assert not coverage.complete
    assert any("split off into .dwo files" in text for text in coverage.missing)


def test_what_dwz_moved_away_is_said(vmlinux, tmp_path):
    link, moved = tmp_path / "link", tmp_path / "vmlinux"
    link.write_bytes(b"/usr/lib/debug/.dwz/common\0" + bytes(20))
    add = f".gnu_debugaltlink={link}"
    tiny_kernel.run(tmp_path, "objcopy", "--add-section", add, str(vmlinux), str(moved))
    assert scan(files(vmlinux), load(), workers=1).coverage.complete
    coverage = scan(files(moved), load(), workers=1).coverage
    assert any("dwz moved it to" in text for text in coverage.missing)
