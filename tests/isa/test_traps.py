"""Trap class, direction and width of each instruction that leaves the guest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from iced_x86 import Code, Decoder, Mnemonic

from trapline.isa import traps
from trapline.isa.traps import Trap

EXPECTED = {
    "inb %dx,%al": Trap("pio", "read", 1),
    "inb $0x71,%al": Trap("pio", "read", 1),
    "inw %dx,%ax": Trap("pio", "read", 2),
    "inw $0x71,%ax": Trap("pio", "read", 2),
    "inl %dx,%eax": Trap("pio", "read", 4),
    "inl $0x71,%eax": Trap("pio", "read", 4),
    "rex.W in %dx,%eax": Trap("pio", "read", 4),
    "outb %al,%dx": Trap("pio", "write", 1),
    "outb %al,$0x80": Trap("pio", "write", 1),
    "outw %ax,%dx": Trap("pio", "write", 2),
    "outw %ax,$0x80": Trap("pio", "write", 2),
    "outl %eax,%dx": Trap("pio", "write", 4),
    "outl %eax,$0x80": Trap("pio", "write", 4),
    "insb (%dx),%es:(%rdi)": Trap("pio", "read", 1),
    "rep insb (%dx),%es:(%rdi)": Trap("pio", "read", 1),
    "rep insw (%dx),%es:(%rdi)": Trap("pio", "read", 2),
    "rep insl (%dx),%es:(%rdi)": Trap("pio", "read", 4),
    "outsb %ds:(%rsi),(%dx)": Trap("pio", "write", 1),
    "outsw %ds:(%rsi),(%dx)": Trap("pio", "write", 2),
    "rep outsl %ds:(%rsi),(%dx)": Trap("pio", "write", 4),
    "rdmsr": Trap("msr", "read", 8),
    "wrmsr": Trap("msr", "write", 8),
    ".byte 0x0f,0x01,0xc6": Trap("msr", "write", 8),  # wrmsrns
    ".byte 0xf2,0x0f,0x01,0xc6": Trap("msr", "read", 0),  # rdmsrlist
    ".byte 0xf3,0x0f,0x01,0xc6": Trap("msr", "write", 0),  # wrmsrlist
    "cpuid": Trap("cpuid", "read", 16),
    "hlt": Trap("hlt", "execute", 0),
    "mwait": Trap("mwait", "execute", 0),
    "mwaitx": Trap("mwait", "execute", 0),
    "monitor": Trap("monitor", "execute", 0),
    "monitorx": Trap("monitor", "execute", 0),
    "wbinvd": Trap("wbinvd", "execute", 0),
    "wbnoinvd": Trap("wbinvd", "execute", 0),
    "invd": Trap("wbinvd", "execute", 0),
    "mov %rax,%cr0": Trap("cr", "write", 8),
    "mov %r15,%cr4": Trap("cr", "write", 8),
    "lmsw %ax": Trap("cr", "write", 2),
    "lmsw (%rdi)": Trap("cr", "write", 2),
    "clts": Trap("cr", "write", 0),
    ".byte 0x66,0x0f,0x01,0xcc": Trap("tdcall", "execute", 0),
    ".byte 0x66,0x0f,0x01,0xcf": Trap("tdcall", "execute", 0),  # seamcall
    "vmcall": Trap("vmcall", "execute", 0),
    "vmmcall": Trap("vmcall", "execute", 0),
    "rdpmc": Trap("rdpmc", "read", 8),
    "encls": Trap("encls", "execute", 0),
    "xsetbv": Trap("xsetbv", "write", 8),
    "vmxon (%rdi)": Trap("other", "execute", 0),
    "vmread %rax,%rbx": Trap("other", "execute", 0),
    "vmresume": Trap("other", "execute", 0),
    "invept (%rdi),%rax": Trap("other", "execute", 0),
    "getsec": Trap("other", "execute", 0),
    "pconfig": Trap("other", "execute", 0),
}

NATIVE = [
    "mov %rax,%cr2",
    "mov %rax,%cr3",
    "mov %rax,%cr8",
    "mov %cr0,%rax",
    "mov %cr4,%rax",
    "smsw %eax",
    "umwait %eax",
    "tpause %eax",
    "umonitor %rax",
    "rdtsc",
    "rdtscp",
    "rdpid %rax",
    "pause",
    "invlpg (%rax)",
    "invpcid (%rax),%rbx",
    "enclu",
    "xgetbv",
    "clflush (%rax)",
    "mov (%rdi),%eax",
    "mov %rax,%dr7",
    "lgdt (%rax)",
    "stac",
    "rdrand %rax",
]


@pytest.mark.parametrize("source", EXPECTED)
def test_class_direction_and_width(assembler, source):
    assert traps.classify(assembler.instruction(source)) == EXPECTED[source]


@pytest.mark.parametrize("source", NATIVE)
def test_what_does_not_exit_is_no_trap(assembler, source):
    assert traps.classify(assembler.instruction(source)) is None


def test_every_mnemonic_of_the_table_has_a_form():
    mnemonics = {getattr(Mnemonic, name) for name in traps._BY_MNEMONIC}
    covered = set()
    for code in traps.BY_CODE:
        assert 0 < code < 1 << 13
        covered.add(code)
    forms = {getattr(Code, name) for name in traps._BY_FORM}
    assert len(covered - forms) >= len(mnemonics)


def test_the_table_alone_decides_but_for_control_registers(assembler):
    """A scan looks at BY_CODE first: what classify() finds must be in it."""
    source = "\n".join([*EXPECTED, *NATIVE])
    for instruction in Decoder(64, assembler.code(source), ip=0):
        if traps.classify(instruction) is not None:
            assert instruction.code in traps.BY_CODE


@given(st.binary(min_size=1, max_size=64))
def test_any_bytes_are_classified(data):
    for instruction in Decoder(64, data, ip=0):
        trap = traps.classify(instruction)
        assert trap is None or trap.width in {0, 1, 2, 4, 8, 16}
