"""Splats: what is taken down from an engine, and that no guest state makes that fail."""

import struct

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from trapline.cpu.engine import Reg, SegmentRegister
from trapline.kernel.binary import TextSection
from trapline.kernel.elf.functions import Symbol
from trapline.kernel.live.orc import OrcReg, OrcTable, OrcType
from trapline.kernel.live.runtime import RuntimeSymbols
from trapline.machine.observe.backtrace import backtrace
from trapline.machine.observe.lastwords import take_splat
from trapline.report.formats.text import lines
from trapline.report.pages.splat import page
from trapline.results.scan import Frame
from trapline.results.splat import Splat, trace_lines


def shown(splat):
    return lines(page(splat))


TEXT = 0xFFFFFFFF81000000
STACK = 0xFFFFC90000010000


class Image:
    name = "vmlinux"
    text = (TextSection(".text", TEXT, memoryview(bytes(0x300))),)

    def symbol_at(self, address):
        index = (address - TEXT) // 0x100
        return Symbol(["leaf", "caller", "start"][index], TEXT + 0x100 * index, 0x100)

    def chain(self, address):
        symbol = self.symbol_at(address)
        return (
            Frame(function="readl", file="arch/x86/include/asm/io.h", line=60),
            Frame(function=symbol.name, file="kernel/\x1b[31m.c", line=None),
        )


class StoppedVcpu:
    """Registers and memory of a guest that no longer runs."""

    def __init__(self, cpl=0):
        self.regs = [0x1000 + register for register in range(17)]
        self.regs[Reg.RIP] = TEXT + 0x40
        self.regs[Reg.RSP] = STACK
        self.rflags = 0x10046
        self.cpl = cpl
        self.memory = {STACK & ~0xFFF: bytearray(4096), TEXT: bytearray(range(256)) * 16}
        self.control = {0: 0x80050033, 2: 0xDEAD, 3: 0x1000, 4: 0x20}
        self.debug = {0: 0, 1: 0, 2: 0, 3: 0, 6: 0xFFFF0FF0, 7: 0x400}

    def segment(self, name):
        return SegmentRegister({"cs": 0x10, "ss": 0x18}.get(name, 0), 0, 0xFFFFFFFF, 0)

    def msr(self, index):
        return {0xC0000101: 0xFFFF88801F200000}.get(index, 0)

    def cr(self, number):
        return self.control[number]

    def dr(self, number):
        return self.debug[number]

    def read(self, gla, size):
        page = self.memory.get(gla & ~0xFFF)
        if page is None or (gla & 0xFFF) + size > 4096:
            return None
        return bytes(page[gla & 0xFFF : (gla & 0xFFF) + size])

    def push(self, *words):
        struct.pack_into(f"<{len(words)}Q", self.memory[STACK & ~0xFFF], 0, *words)


def symbols(*entries, image=None):
    ip = b"".join(struct.pack("<i", 0x100 * i - 4 * i) for i in range(len(entries)))
    unwind = b"".join(struct.pack("<hhH", size, 0, flags) for size, flags in entries)
    found = RuntimeSymbols()
    found.place_vmlinux(image or Image(), 0, OrcTable.parse(ip, TEXT, unwind, 3))
    return found


CALL = OrcReg.SP | OrcType.CALL << 8
END = OrcType.END_OF_STACK << 8


def splat_of(vcpu, known, injected=(), traps=()):
    return take_splat(
        vcpu,
        known,
        banner="PANIC: double fault, error_code: 0x0",
        injected=injected,
        traps=traps,
        reproduce="trapline boot vmlinux --memory 512M",
    )


def test_a_splat_reads_as_the_kernels():
    vcpu = StoppedVcpu()
    vcpu.push(TEXT + 0x222, TEXT + 0x120, TEXT + 0x210)
    known = symbols((16, CALL), (8, CALL), (0, END))
    splat = splat_of(vcpu, known, traps=["#VE HLT at default_idle+0x1/0x2"])
    code = bytes(range(256))
    prologue = code[0x40 - 42 : 0x40].hex(" ")
    assert list(shown(splat)) == [
        "PANIC: double fault, error_code: 0x0",
        "RIP: 0010:leaf+0x40/0x100",
        f"Code: {prologue} <40> {code[0x41:0x56].hex(' ')}",
        "RSP: 0018:ffffc90000010000 EFLAGS: 00010046",
        "RAX: 0000000000001000 RBX: 0000000000001003 RCX: 0000000000001001",
        "RDX: 0000000000001002 RSI: 0000000000001006 RDI: 0000000000001007",
        "RBP: 0000000000001005 R08: 0000000000001008 R09: 0000000000001009",
        "R10: 000000000000100a R11: 000000000000100b R12: 000000000000100c",
        "R13: 000000000000100d R14: 000000000000100e R15: 000000000000100f",
        "FS:  0000000000000000(0000) GS:ffff88801f200000(0000) knlGS:0000000000000000",
        "CS:  0010 DS: 0000 ES: 0000 CR0: 0000000080050033",
        "CR2: 000000000000dead CR3: 0000000000001000 CR4: 0000000000000020",
        " leaf+0x40/0x100",
        "     arch/x86/include/asm/io.h:60 readl (inlined)",
        r"     kernel/\x1b[31m.c:?",
        "Call Trace:",
        " ? start+0x22/0x100",
        " caller+0x20/0x100",
        "     arch/x86/include/asm/io.h:60 readl (inlined)",
        r"     kernel/\x1b[31m.c:?",
        " start+0x10/0x100",
        "     arch/x86/include/asm/io.h:60 readl (inlined)",
        r"     kernel/\x1b[31m.c:?",
        "Last traps, newest last:",
        "  #VE HLT at default_idle+0x1/0x2",
        "To reproduce:",
        "  trapline boot vmlinux --memory 512M",
    ]


def test_injected_events_come_first():
    splat = splat_of(StoppedVcpu(), symbols((8, CALL)), injected=["NMI at boundary 17"])
    assert next(iter(shown(splat))) == "INJECTED by trapline: NMI at boundary 17"


def test_an_interrupted_context_shows_its_registers():
    vcpu = StoppedVcpu()
    vcpu.push(TEXT + 0x120, *range(0xA0, 0xB0), TEXT + 0x233, 0x10, 0x246, STACK + 0x800, 0x18)
    known = symbols((8, CALL), (0, OrcReg.SP | OrcType.REGS << 8 | 0x800), (0, END))
    found = list(shown(splat_of(vcpu, known)))
    at = found.index(" start+0x33/0x100")
    assert found[at + 3] == " RIP: 0010:start+0x33/0x100"
    assert found[at + 4] == " RSP: 0018:ffffc90000010800 EFLAGS: 00000246"
    assert found[at + 5].startswith(" RAX: 00000000000000aa RBX: 00000000000000a5")


def test_debug_registers_are_shown_when_in_use():
    vcpu = StoppedVcpu()
    assert not any("DR7" in line for line in shown(splat_of(vcpu, symbols())))
    vcpu.debug[7] = 0x401
    assert any(line.endswith("DR7: 0000000000000401") for line in shown(splat_of(vcpu, symbols())))


def test_an_unreadable_rip_says_so():
    vcpu = StoppedVcpu()
    vcpu.regs[Reg.RIP] = 0
    vcpu.memory.clear()
    found = list(shown(splat_of(vcpu, symbols())))
    assert "RIP: 0010:0x0" in found
    assert "Code: Unable to access opcode bytes." in found
    assert " (the stack makes no sense from here on)" in found


def test_ring_3_has_no_kernel_trace():
    vcpu = StoppedVcpu(cpl=3)
    vcpu.regs[Reg.RIP] = 0x401000
    splat = splat_of(vcpu, symbols((8, CALL)))
    assert splat.registers.cs == "0013"
    assert splat.place.label == "user+0x401000"
    assert splat.trace == ()


def test_back_trace_lines_alone():
    vcpu = StoppedVcpu()
    vcpu.push(TEXT + 0x222)
    places, complete = backtrace(vcpu, symbols((8, CALL), (8, CALL), (0, END)))
    assert complete
    found = [line for place in places for line in trace_lines(place)]
    assert [line for line in found if not line.startswith("     ")] == [
        " leaf+0x40/0x100",
        " start+0x22/0x100",
    ]


def test_a_splat_survives_the_way_through_json():
    splat = splat_of(StoppedVcpu(), symbols((8, CALL)))
    assert msgspec.json.decode(msgspec.json.encode(splat), type=Splat) == splat


word = st.one_of(st.integers(0, 2**64 - 1), st.integers(TEXT, TEXT + 0x2FF), st.just(STACK))


@settings(max_examples=200, deadline=None)
@given(st.lists(word, min_size=17, max_size=17), st.lists(word, max_size=512), st.integers(0, 3))
def test_no_state_makes_it_fail(values, stack, cpl):
    vcpu = StoppedVcpu(cpl)
    vcpu.regs = values
    vcpu.push(*stack)
    splat = splat_of(vcpu, symbols((8, CALL), (16, OrcReg.BP | 1 << 4 | OrcType.CALL << 8)))
    assert all(line.isascii() and line.isprintable() for line in shown(splat))


class Kernel(Image):
    """A kernel that prints from the handler of an exception."""

    names = ("vprintk_emit", "exc_page_fault", "culprit")

    def symbol_at(self, address):
        index = (address - TEXT) // 0x100
        return Symbol(self.names[index], TEXT + 0x100 * index, 0x100)


class Interrupted(Kernel):
    names = ("vprintk_emit", "sysvec_apic_timer_interrupt", "innocent")


def blamed(image, blame):
    vcpu = StoppedVcpu()
    frame = (*range(0xA0, 0xB0), TEXT + 0x233, 0x10, 0x246, STACK + 0x800, 0x18)
    vcpu.push(TEXT + 0x120, *frame)
    known = symbols((8, CALL), (0, OrcReg.SP | OrcType.REGS << 8 | 0x800), (0, END), image=image)
    return take_splat(vcpu, known, banner="", injected=(), traps=(), reproduce="", blame=blame)


def test_the_splat_of_a_complaint_is_about_what_took_the_exception():
    splat = blamed(Kernel(), "exception")
    assert splat.place.label == splat.registers.rip == "culprit+0x33/0x100"
    assert splat.registers.general["rax"] == "00000000000000aa"
    assert splat.registers.control["cr2"] == "000000000000dead"
    assert blamed(Kernel(), None).place.label == "vprintk_emit+0x40/0x100"


def test_an_interrupt_is_to_blame_for_what_the_clock_found_out_only():
    assert blamed(Interrupted(), "exception").place.label == "vprintk_emit+0x40/0x100"
    assert blamed(Interrupted(), "event").place.label == "innocent+0x33/0x100"
