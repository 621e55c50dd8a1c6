"""Finds code that may access a device without any list of accessors, to check the scan's list.

The scan and `diewalk` know accessors by name: what has another name, both miss. This module goes
by what an accessor cannot hide:

- its types: a parameter that points to something volatile (`volatile void __iomem *`), in any
  function; or a pointer to void, in a function that is declared in arch/x86/include/asm/ or
  include/asm-generic/, as mmio_config_readl() has it;
- its instructions, where they are for devices: MOVDIR64B, MOVDIRI, ENQCMD, ENQCMDS, MOVNTDQA.

Each instance of such a function that accesses memory must hold a site of the scan, or stand in
`REVIEWED` with the reason why it is no device's. With the product this shares iced-x86 and nothing
else; with `diewalk` the reader of DIEs.
"""

import re
from bisect import bisect_left
from typing import NamedTuple

import numba
import numpy as np
from iced_x86 import Decoder, Mnemonic, OpKind, Register

import diewalk
from diewalk import _abbreviations, _uleb, _value, _word

_MASK = (1 << 64) - 1
_POINTER, _CONST, _VOLATILE, _TYPEDEF, _RESTRICT = 0x0F, 0x26, 0x35, 0x16, 0x37
_DEPTH = 8  # typedefs and qualifiers that are followed
_HEADERS = re.compile(r"(^|/)(arch/x86/include/asm|include/asm-generic)/")
_MNEMONICS = {
    getattr(Mnemonic, name): name.lower()
    for name in ("MOVDIR64B", "MOVDIRI", "ENQCMD", "ENQCMDS", "MOVNTDQA")
}
_DEVICE_OPCODES = re.compile(rb"\x0f\x38[\xf8\xf9\x2a]")
# They have a memory operand and no access, or none but that of a target.
_NO_ACCESS = {
    *(Mnemonic.LEA, Mnemonic.NOP, Mnemonic.CALL, Mnemonic.JMP, Mnemonic.INVLPG),
    *(Mnemonic.PREFETCHW, Mnemonic.PREFETCHT0, Mnemonic.PREFETCHNTA),
    *(Mnemonic.CLFLUSH, Mnemonic.CLFLUSHOPT, Mnemonic.CLWB),
}
# (file, function) -> why what they access is no device. Read in Linux 6.12, function by function.
_HEADER = "arch/x86/include/asm/+"
REVIEWED = {
    (r"/bitops(/[a-z-]+)?\.h$", r".*"): "bits of variables",
    (_HEADER + r"sync_bitops\.h$", r"sync_.*"): "bits of memory shared with Xen",
    (r"include/linux/nodemask\.h$", r"__node_(set|clear)"): "bits of variables",
    (r"fs/bcachefs/util\.h$", r"mod_bit"): "bits of variables",
    (_HEADER + r"(cmpxchg|atomic)(64)?(_64)?\.h$", r"arch_.*|set_64bit"): "variables",
    (r"include/asm-generic/unaligned\.h$", r"[gp][eu]t_unaligned_[bl]e\d\d"): "protocols' fields",
    (r"include/asm-generic/access_ok\.h$", r"__access_ok"): "a limit of the user's memory",
    (r"include/asm-generic/rwonce\.h$", r"__read_once_word_nocheck|read_word_at_a_time"): "memory",
    (r"include/(\./)?asm/(/|trace/+)?(\./)?[a-z_-]+\.h$", r".*trace(iter)?_.*"): "trace points",
    (_HEADER + r"uaccess(_64)?\.h$", r".*"): "the user's memory",
    (_HEADER + r"word-at-a-time\.h$", r"load_unaligned_zeropad"): "strings",
    (_HEADER + r"string_64\.h$", r"memcpy_flushcache"): "persistent memory, which is cached",
    (_HEADER + r"checksum_64\.h$", r"ip_fast_csum"): "packets",
    (_HEADER + r"desc\.h$", r"desc_empty|native_(set_ldt|write_[gl]dt_entry)"): "descriptor tables",
    (_HEADER + r"paravirt\.h$", r"set_ldt"): "a call through pv_ops",
    (_HEADER + r"page_64\.h$", r"clear_page"): "a page of memory",
    (_HEADER + r"processor\.h$", r"prefetchw"): "prefetches, and what the compiler moved there",
    (_HEADER + r"runtime-const\.h$", r"__runtime_fixup_(ptr|shift)"): "kernel text",
    (_HEADER + r"text-patching\.h$", r"_*text_gen_insn"): "kernel text",
    (_HEADER + r"stacktrace\.h$", r"on_stack"): "bounds of a stack",
    (_HEADER + r"switch_to\.h$", r"kthread_frame_init"): "a new stack",
    (_HEADER + r"tlb\.h$", r"__tlb_remove_table"): "struct page of a page table",
    (_HEADER + r"edac\.h$", r"edac_atomic_scrub"): "memory that is scrubbed",
    (_HEADER + r"xen/hypercall\.h$", r"HYPERVISOR_\w+"): "arguments of a hypercall",
    # They compute with an address; the load is that of the pointer they were given.
    (_HEADER + r"io\.h$", r"virt_to_phys|phys_to_virt"): "a pointer, not what it points to",
    (_HEADER + r"xen/page\.h$", r"virt_to_\w+"): "a pointer, not what it points to",
    (r"arch/x86/mm/ioremap\.c$", r"iounmap"): "struct vm_struct of a mapping",
    (r"arch/x86/mm/mmio-mod\.c$", r"\w*iounmap\w*"): "the list of traced mappings",
    (r"drivers/nvme/host/core\.c$", r"nvme_complete_async_event"): "a completion, in DMA memory",
    (r"drivers/nvme/host/pci\.c$", r"nvme_dbbuf_\w+"): "shadow doorbells, in DMA memory",
    (r"drivers/iommu/amd/iommu\.c$", r"amd_iommu_report_\w+"): "events, in memory",
    (r"drivers/atm/fore200e\.c$", r"fore200e_poll"): "status words, in DMA memory",
    (r"drivers/atm/fore200e\.c$", r"fore200e_io_poll"): "calls its bus, where the accesses are",
    (r"drivers/net/ethernet/3com/typhoon\.c$", r"typhoon_\w+"): "indexes, in DMA memory",
    (r"drivers/net/fddi/skfp/\w+\.c$", r"\w+"): "descriptors, in DMA memory",
    (r"drivers/net/wireless/ath/wil6210/txrx\.c$", r"wil_set_\w+"): "descriptors, in DMA memory",
    # A device's, and missed: the page on limitations names them.
    (r"drivers/gpu/drm/(amd/amdgpu|radeon)/\w+\.c$", r"\w+_get_csb_buffer"): (
        "a buffer that may be in video memory, dereferenced without an accessor"
    ),
    (r"drivers/xen/events/events_fifo\.c$", r"clear_\w+"): "event words, in memory shared with Xen",
}


class Suspect(NamedTuple):
    """One instance of a function that accesses memory: what it is, where declared, where placed.

    `mark` is what made it a suspect. `spans` are (start, end): addresses in vmlinux, offsets in
    `section` in a module.
    """

    section: str
    function: str
    file: str
    mark: str
    spans: tuple[tuple[int, int], ...]


@numba.njit(cache=True)
def _walk(info, abbrev, functions, parameters, types):  # noqa: C901, PLR0912, PLR0915 - one hot loop
    """Store subprograms, parameters and types; returns how many there are of each."""
    tags = np.zeros(1 << 16, np.int64)
    children = np.zeros(1 << 16, np.uint8)
    first = np.zeros(1 << 16, np.int64)
    names = np.zeros(1 << 20, np.int64)
    forms = np.zeros(1 << 20, np.int64)
    implicit = np.zeros(1 << 20, np.int64)
    parents = np.zeros(1 << 12, np.int64)
    counts = np.zeros(3, np.int64)
    unit = 0
    while unit < len(info):
        end = unit + 4 + _word(info, unit, 4)
        if _word(info, unit + 4, 2) >= 5:
            address_size, table, at = np.int64(info[unit + 7]), _word(info, unit + 8, 4), unit + 12
        else:
            address_size, table, at = np.int64(info[unit + 10]), _word(info, unit + 6, 4), unit + 11
        _abbreviations(abbrev, table, tags, children, first, names, forms, implicit)
        lines = np.int64(-1)
        depth = 0
        while at < end:
            die = at
            code, at = _uleb(info, at)
            if code == 0:
                depth -= 1
                continue
            tag, kind, file = tags[code], np.int64(-1), np.int64(-1)
            row = first[code]
            while names[row] != 0 or forms[row] != 0:
                if forms[row] == 0x21:  # DW_FORM_implicit_const
                    value, _ = _uleb(abbrev, implicit[row])
                else:
                    value, at = _value(info, at, forms[row], address_size)
                if names[row] == 0x49:  # type
                    kind = value + unit if 0x11 <= forms[row] <= 0x15 else value
                elif names[row] == 0x3A:  # decl_file
                    file = value
                elif names[row] == 0x10:  # stmt_list
                    lines = value
                row += 1
            if tag == 0x2E:
                if counts[0] < len(functions):
                    functions[counts[0]] = (die, file, lines)
                counts[0] += 1
            elif tag == 0x05 and kind != -1 and depth > 0:
                if counts[1] < len(parameters):
                    parameters[counts[1]] = (parents[depth - 1], kind, 0)
                counts[1] += 1
            elif tag in (0x0F, 0x26, 0x35, 0x16, 0x37):
                if counts[2] < len(types):
                    types[counts[2]] = (die, tag, kind)
                counts[2] += 1
            if children[code]:
                parents[depth] = die
                depth += 1
        unit = end
    return counts


def _tables(info, abbrev):
    empty = np.zeros((0, 3), np.int64)
    counts = _walk(info, abbrev, empty, empty, empty)
    tables = [np.zeros((count, 3), np.int64) for count in counts]
    _walk(info, abbrev, *tables)
    return tables


def _owners(parameters, types):
    """Return the functions with a pointer to volatile, and those with a pointer to void."""
    if not len(types):
        return set(), set()
    kind = parameters[:, 1].copy()
    pointed = np.zeros(len(kind), np.bool_)
    volatile, void = pointed.copy(), pointed.copy()
    for _ in range(_DEPTH):
        place = np.minimum(np.searchsorted(types[:, 0], kind), len(types) - 1)
        known = types[place, 0] == kind
        tag = np.where(known, types[place, 1], 0)
        target = np.where(known, types[place, 2], -2)
        volatile |= pointed & (tag == _VOLATILE)
        through = pointed & (tag == _POINTER)  # a pointer to a pointer ends it
        pointed |= tag == _POINTER
        void |= pointed & ~through & (target == -1)
        kind = np.where(through, -2, target)
    return set(parameters[volatile, 0].tolist()), set(parameters[void, 0].tolist())


class _Files:
    """The names of source files, by the offset of a unit's line table and number (DWARF 5)."""

    def __init__(self, debug):
        self._data = debug["line"]
        self._strings = {0x1F: debug["line_str"].tobytes(), 0x0E: debug["str"].tobytes()}
        self._read = {}

    def name(self, table, number):
        if table < 0 or number < 0:
            return ""
        if table not in self._read:
            self._read[table] = self._table(table)
        files = self._read[table]
        return files[number] if number < len(files) else ""

    def _table(self, at):
        assert _word(self._data, at + 4, 2) == 5, "not DWARF 5"
        at += 17  # up to opcode_base, which counts itself
        folders, at = self._entries(at + int(self._data[at]))
        files, _ = self._entries(at)
        return [
            name if name.startswith("/") else f"{folders[folder][0]}/{name}"
            for name, folder in files
        ]

    def _entries(self, at):
        formats = []
        count, at = int(self._data[at]), at + 1
        for _ in range(count):
            content, at = _uleb(self._data, at)
            form, at = _uleb(self._data, at)
            formats.append((int(content), int(form)))
        count, at = _uleb(self._data, at)
        entries = []
        for _ in range(int(count)):
            fields = {1: "", 2: 0}
            for content, form in formats:
                value, at = _value(self._data, at, form, 8)
                if form in self._strings:
                    strings = self._strings[form]
                    value = strings[value : strings.index(b"\0", value)].decode()
                fields[content] = value
            entries.append((fields[1], int(fields[2])))
        return entries, at


def find(path, debug=None):
    """Return the `Suspect`s of a vmlinux or a module; `debug` is where its DWARF is."""
    image = diewalk._Image(path, debug)
    return [*_by_type(image), *_by_instruction(image)]


def _by_type(image):
    functions, parameters, types = _tables(image.debug["info"], image.debug["abbrev"])
    volatile, void = _owners(parameters, types)
    files = _Files(image.debug)
    marked = {}
    for die, file, lines in functions.tolist():
        if die in volatile or die in void:
            name = files.name(lines, file)
            if die in volatile or _HEADERS.search(name):
                marked[die] = (name, "volatile" if die in volatile else "void")
    if not marked:
        return
    for die, function, ranges in diewalk._Functions(image).placed(marked):
        found = [(image.text_at(start), start, end) for start, end in ranges]
        placed = [item for item in found if item[0] is not None]
        if any(_accesses_memory(*item) for item in placed):
            shift = placed[0][0][0] if image.module else 0
            spans = tuple((start - shift, end - shift) for _, start, end in placed)
            yield Suspect(placed[0][0][1], function, *marked[die], spans)


def _by_instruction(image):
    for base, (section, data) in image.texts.items():
        if not _DEVICE_OPCODES.search(data):
            continue
        for instruction in Decoder(64, data, ip=base):
            if instruction.mnemonic in _MNEMONICS:
                address = instruction.ip - base if image.module else instruction.ip
                name = _MNEMONICS[instruction.mnemonic]
                yield Suspect(section, name, "", "instruction", ((address, address + 1),))


def _accesses_memory(text, start, end):
    """Whether a piece of code accesses what may be a device: no stack, variable or per-CPU data."""
    base, _, data = text
    return any(
        instruction.mnemonic not in _NO_ACCESS
        and instruction.memory_base not in {Register.RSP, Register.RIP}
        and instruction.memory_segment != Register.GS
        and (
            instruction.is_string_instruction
            or any(instruction.op_kind(n) == OpKind.MEMORY for n in range(instruction.op_count))
        )
        for instruction in Decoder(64, data[start - base : end - base], ip=start)
    )


def unexplained(suspects, sites, module):
    """Return the suspects that hold no access of the scan and that nobody has reviewed."""
    places = {}
    for site in sites:
        if site.module == module and site.trap in {"mmio", "pio"}:
            # A scan calls parts of vmlinux's .text by names of their own.
            section = "" if module == "vmlinux" else site.section
            places.setdefault(section, []).append(int(site.address, 16))
    for addresses in places.values():
        addresses.sort()
    return [
        suspect
        for suspect in suspects
        if reason(suspect) is None
        and not any(
            bisect_left(known, start) < bisect_left(known, end)
            for known in [places.get("" if module == "vmlinux" else suspect.section, [])]
            for start, end in suspect.spans
        )
    ]


def reason(suspect):
    """Say why a suspect is no access to a device; None where nobody looked at it."""
    for (file, function), why in REVIEWED.items():
        if re.search(file, suspect.file) and re.fullmatch(function, suspect.function):
            return why
    return None
