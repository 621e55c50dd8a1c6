"""What Linux's #VE handler accepts, over all encodings of the forms in its table.

The expectations are written from arch/x86/lib/insn-eval.c and arch/x86/coco/tdx/tdx.c (v6.12), not
derived from trapline's table.
"""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from iced_x86 import Decoder

from trapline.linux import ve_handler
from trapline.linux.ve_handler import UPSTREAM, VeHandler, emulable, emulable_mmio

# What is said of a form in whose emulation nothing is known to be wrong.
FLAWLESS = re.compile(r"handle_mmio\(\) emulates [A-Z]+ [a-z0-9,]+")
LOW = ["al", "cl", "dl", "bl", "spl", "bpl", "sil", "dil", *(f"r{n}b" for n in range(8, 16))]
R16 = ["ax", "cx", "dx", "bx", "sp", "bp", "si", "di", *(f"r{n}w" for n in range(8, 16))]
R32 = ["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", *(f"r{n}d" for n in range(8, 16))]
R64 = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16))]
ADDRESSES = [
    "(%rdi)",
    "0x10(%r8)",
    "-0x1000(%rbp)",
    "(%rax,%r9,4)",
    "0x12345678(,%rcx,8)",
    "0x1000",
    "0x20(%rip)",
    "(%edi)",
    "%gs:(%rdi)",
    "%fs:0x28",
]


def decode(assembler, lines):
    return list(Decoder(64, assembler.code("\n".join(lines)), ip=0))


@pytest.mark.parametrize("address", ADDRESSES)
def test_register_moves_are_emulated(assembler, address):
    lines = []
    for register in (*LOW, *R16, *R32, *R64):
        # A high displacement of A0-A3 would be chosen for the accumulator and no base.
        if address in {"0x1000", "%fs:0x28"} and register in {"al", "ax", "eax", "rax"}:
            continue
        lines += [f"mov %{register},{address}", f"mov {address},%{register}"]
    instructions = decode(assembler, lines)
    assert len(instructions) == len(lines)
    for instruction in instructions:
        answer = emulable(instruction)
        assert answer.emulable, str(instruction)
        assert FLAWLESS.fullmatch(answer.reason), str(instruction)


@pytest.mark.parametrize("address", ADDRESSES)
def test_immediate_moves_are_emulated(assembler, address):
    lines = [f"{mnemonic} $0x12,{address}" for mnemonic in ("movb", "movw", "movl", "movq")]
    for instruction in decode(assembler, lines):
        answer = emulable(instruction)
        assert answer.emulable, str(instruction)
        assert FLAWLESS.fullmatch(answer.reason), str(instruction)


@pytest.mark.parametrize("mnemonic", ["movzb", "movzw", "movsb", "movsw"])
def test_extending_moves(assembler, mnemonic):
    """Linux zeroes or sign-fills `insn.opnd_bytes` bytes: 4 for a 32-bit destination, not 8."""
    for suffix, registers, exact in (("w", R16, True), ("l", R32, False), ("q", R64, True)):
        if mnemonic[-1] == suffix:
            continue
        lines = [f"{mnemonic}{suffix} (%rdi),%{register}" for register in registers]
        for instruction in decode(assembler, lines):
            answer = emulable(instruction)
            assert answer.emulable, str(instruction)
            assert ("63:32" in answer.reason) == (not exact)
            assert bool(FLAWLESS.fullmatch(answer.reason)) == exact


@pytest.mark.parametrize(
    ("register", "taken"), [("ah", "SPL"), ("ch", "BPL"), ("dh", "SIL"), ("bh", "DIL")]
)
def test_high_byte_registers_are_mistaken(assembler, register, taken):
    for instruction in decode(assembler, [f"mov %{register},(%rdi)", f"mov (%rdi),%{register}"]):
        answer = emulable(instruction)
        assert answer.emulable
        assert taken in answer.reason
        assert register.upper() in answer.reason


@pytest.mark.parametrize("prefix", ["cs", "ds", "rex.W", "rex", "xacquire lock;", "data16 rex.W"])
def test_prefixes_do_not_change_the_form(assembler, prefix):
    if prefix.startswith("xacquire"):
        code = bytes.fromhex("f2 89 07")  # XACQUIRE is for MOV to memory without LOCK: XRELEASE
        (instruction,) = Decoder(64, code, ip=0)
    else:
        (instruction,) = decode(assembler, [f"{prefix} mov %ecx,(%rdi)"])
    assert emulable(instruction).emulable


@pytest.mark.parametrize(
    ("code", "accepted"),
    [
        ("4b 66 88 9d 00 01 00 00", False),
        ("66 41 88 9d 00 01 00 00", True),
        ("48 48 89 07", False),
        ("48 89 07", True),
        ("f3 4f 2e 8a 07", False),
    ],
)
def test_a_prefix_behind_rex_is_an_opcode_to_the_kernel(code, accepted):
    """insn_get_prefixes() in arch/x86/lib/insn.c."""
    data = bytes.fromhex(code)
    (instruction,) = Decoder(64, data, ip=0)
    assert emulable_mmio(instruction, code=data).emulable is accepted
    assert emulable(instruction, code=data).emulable is accepted
    assert emulable(instruction).emulable


REFUSED = [
    "movabs 0x1122334455667788,%al",
    "movabs 0x1122334455667788,%eax",
    "movabs %rax,0x1122334455667788",
    "movslq (%rdi),%rax",
    "movnti %eax,(%rdi)",
    "movdiri %eax,(%rdi)",
    "movdir64b (%rdi),%rax",
    "movbe (%rdi),%eax",
    "movbe %eax,(%rdi)",
    "xchg %eax,(%rdi)",
    "lock addl $1,(%rdi)",
    "orl $1,(%rdi)",
    "andl %eax,(%rdi)",
    "incl (%rdi)",
    "lock cmpxchg %ecx,(%rdi)",
    "lock xadd %ecx,(%rdi)",
    "lock bts $3,(%rdi)",
    "btl $3,(%rdi)",
    "testl $1,(%rdi)",
    "test %eax,(%rdi)",
    "cmpl $0,(%rdi)",
    "cmp (%rdi),%eax",
    "add (%rdi),%eax",
    "push (%rdi)",
    "pop (%rdi)",
    "call *(%rdi)",
    "stosb",
    "rep stosl",
    "lodsb",
    "rep lodsl",
    "cmpsb",
    "scasb",
    "movd (%rdi),%xmm0",
    "movdqu %xmm0,(%rdi)",
    "movups (%rdi),%xmm0",
    "vmovdqu (%rdi),%ymm0",
    "mov %es,(%rdi)",
    "mov (%rdi),%es",
    "fildl (%rdi)",
    "setz (%rdi)",
    "cmovz (%rdi),%eax",
    "crc32b (%rdi),%eax",
    "popcnt (%rdi),%eax",
]


@pytest.mark.parametrize("source", REFUSED)
def test_other_forms_are_refused(assembler, source):
    answer = emulable_mmio(assembler.instruction(source))
    assert not answer.emulable
    assert "no case for" in answer.reason


@pytest.mark.parametrize("source", ["movsb", "movsw", "movsl", "movsq", "rep movsb", "rep movsq"])
def test_string_moves_are_decoded_but_refused(assembler, source):
    answer = emulable(assembler.instruction(source))
    assert not answer.emulable
    assert "handle_mmio() refuses MOVS" in answer.reason


@pytest.mark.parametrize(
    ("code", "form"),
    [
        ("c5f8c60700", "MOV m8,imm8"),  # vshufps $0,(%rdi),%xmm0,%xmm0
        ("62f27d488807", "MOV m8,r8"),  # vexpandps (%rdi),%zmm0
        ("62f27d488a07", "MOV r8,m8"),  # vcompressps %zmm0,(%rdi)
    ],
)
def test_vector_opcodes_are_taken_for_moves(code, form):
    (instruction,) = Decoder(64, bytes.fromhex(code), ip=0)
    answer = emulable(instruction)
    assert answer.emulable
    assert form in answer.reason


def test_register_forms_are_no_mmio(assembler):
    assert not emulable_mmio(assembler.instruction("mov %eax,%ebx")).emulable


@pytest.mark.parametrize(
    ("source", "accepted", "words"),
    [
        ("inb %dx,%al", True, "handle_io"),
        ("outl %eax,$0x80", True, "handle_io"),
        ("insb", False, "string I/O"),
        ("rep outsl", False, "string I/O"),
        ("rdmsr", True, "read_msr"),
        ("wrmsr", True, "write_msr"),
        (".byte 0x0f,0x01,0xc6", True, "WRMSRNS"),
        (".byte 0xf2,0x0f,0x01,0xc6", False, "no case"),
        ("cpuid", True, "handle_cpuid"),
        ("hlt", True, "handle_halt"),
        ("mwait", False, "no case"),
        ("monitor", False, "no case"),
        ("wbinvd", False, "no case"),
        ("invd", False, "no case"),
        ("vmcall", False, "no case"),
        ("vmmcall", False, "AMD"),
        ("mov %rax,%cr4", False, "owns"),
        ("mov %rax,%cr0", False, "owns"),
        ("rdpmc", False, "PERFMON"),
        ("encls", False, "#UD"),
        ("vmresume", False, "#UD"),
        ("pconfig", False, "no case"),
        ("xsetbv", True, "no #VE"),
        (".byte 0x66,0x0f,0x01,0xcc", True, "TDCALL"),
        (".byte 0x66,0x0f,0x01,0xcf", False, "#UD"),
    ],
)
def test_other_classes(assembler, source, accepted, words):
    answer = emulable(assembler.instruction(source))
    assert answer.emulable is accepted
    assert words in answer.reason


def test_a_kernel_without_tdx_emulates_nothing(assembler):
    handler = VeHandler.derive({"insn_decode_mmio"}.__contains__)
    for source in ("mov (%rdi),%eax", "inb %dx,%al", "wrmsr", "cpuid", "hlt"):
        answer = emulable(assembler.instruction(source), handler)
        assert not answer.emulable
        assert "CONFIG_INTEL_TDX_GUEST" in answer.reason


FUNCTIONS = {"tdx_handle_virt_exception", "insn_decode_mmio"}


def test_the_handler_is_derived_from_symbols():
    handler = VeHandler.derive(FUNCTIONS.__contains__)
    assert handler == UPSTREAM._replace(exact_input=None)
    newer = VeHandler.derive(FUNCTIONS.__contains__, None, {"insn_assign_reg"}.__contains__)
    assert newer == UPSTREAM


def test_port_input_is_exact_where_the_kernel_has_the_fix(assembler):
    port_input = assembler.instruction("inb %dx,%al")
    for has_fix, exact in ((True, True), (False, False), (None, False)):
        answer = emulable(port_input, UPSTREAM._replace(exact_input=has_fix))
        assert answer.emulable
        assert ("0f63e656b1c6" in answer.reason) == (not exact)


def test_the_handler_is_derived_from_types(assembler):
    """A kernel whose decoder lacks a kind refuses it; names before and after v6.3 both count."""
    kinds = {"INSN_MMIO_DECODE_FAILED", "INSN_MMIO_WRITE", "INSN_MMIO_READ"}
    for names in (kinds, {name.removeprefix("INSN_") for name in kinds}):
        handler = VeHandler.derive(FUNCTIONS.__contains__, frozenset(names))
        assert emulable(assembler.instruction("mov (%rdi),%eax"), handler).emulable
        assert not emulable(assembler.instruction("movl $0,(%rdi)"), handler).emulable
        assert not emulable(assembler.instruction("movzbl (%rdi),%eax"), handler).emulable


def test_a_kernel_without_the_decoder_has_no_mmio(assembler):
    handler = VeHandler.derive({"tdx_handle_virt_exception"}.__contains__)
    assert "insn_decode_mmio" in emulable(assembler.instruction("mov (%rdi),%eax"), handler).reason
    assert emulable(assembler.instruction("wrmsr"), handler).emulable


def test_each_row_cites_its_file():
    assert {form.source for form in ve_handler.MMIO_FORMS} == {
        "arch/x86/lib/insn-eval.c",
        "arch/x86/coco/tdx/tdx.c",
    }


@given(st.binary(min_size=1, max_size=15))
def test_any_instruction_gets_a_reason(data):
    for instruction in Decoder(64, data, ip=0):
        for answer in (emulable(instruction), emulable_mmio(instruction)):
            assert answer.reason
            assert not answer.reason.endswith(".")
