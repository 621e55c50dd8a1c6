"""Memory operands, and instruction text as binutils prints it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from iced_x86 import Decoder

from trapline.isa import operands

KERNEL = 0xFFFFFFFF81000000

LISTING = """
mov 0x10(%rdi),%eax
mov %eax,0x10(%rdi)
mov %eax,(%rdi,%rcx,4)
mov 0x0(%rbp),%al
mov 0x0(,%rax,8),%rdx
movl $0x1,0x8(%rdi)
movw $0x1,0x8(%rdi)
movb $0xff,-0x8(%rdi)
movq $0xffffffffffffffff,(%r12)
movzbl (%rdi),%eax
movzwl 0x2(%rsi),%r9d
movzbq (%rdi),%rax
movsbl (%rdi),%eax
movslq (%rdi),%rax
mov %gs:0x28,%rax
mov %fs:0x28,%rax
movabs 0x1122334455667788,%al
movabs $0x1122334455667788,%rax
xchg %eax,(%rdi)
lock add %eax,(%rdi)
lock cmpxchg %rcx,0x40(%rdx)
add $0x10,%rsp
and $0xfffffffffffffff0,%rsp
test %al,%al
in (%dx),%al
out %al,$0x80
rdmsr
wrmsr
cpuid
hlt
wbinvd
vmcall
mov %rax,%cr4
mov %cr0,%rax
push %rbp
pop %r12
ret
leave
nopw 0x0(%rax,%rax,1)
lea 0x8(%rsp),%rdi
sfence
movnti %eax,(%rdi)
bts %rax,(%rdi)
cmpb $0x0,0x5(%rax)
shl $0x4,%eax
"""


def test_text_is_that_of_objdump(assembler):
    checked = 0
    for code, expected in assembler.objdump(LISTING):
        instruction = Decoder(64, code, ip=0).decode()
        # objdump writes a shift's and a port's operands its own way; the rest is the same.
        ours = operands.format_instruction(instruction)
        assert ours.replace("in %dx", "in (%dx)") == expected
        checked += 1
    assert checked == len(LISTING.split("\n")) - 2


def test_string_instructions_differ_from_objdump_in_segments_only(assembler):
    for code, expected in assembler.objdump("movsb\nrep movsl\nrep stosb\nrep insl"):
        ours = operands.format_instruction(Decoder(64, code, ip=0).decode())
        bare = expected.replace("%ds:", "").replace("%es:", "").replace("(%dx)", "%dx")
        assert ours.split(" ")[:-1] == bare.split(" ")[:-1]


def operand(assembler, source):
    found = operands.memory_operands(assembler.instruction(source))
    assert len(found) == 1
    return found[0]


def test_base_index_scale_and_displacement(assembler):
    found = operand(assembler, "mov -0x20(%rdi,%r9,4),%eax")
    assert found == operands.MemoryOperand("rdi", "r9", 4, -0x20, "ds", 4, "read")
    assert not found.is_stack
    assert not found.is_rip_relative


@pytest.mark.parametrize(
    ("source", "width", "access"),
    [
        ("movb %al,(%rdi)", 1, "write"),
        ("movw %ax,(%rdi)", 2, "write"),
        ("mov %eax,(%rdi)", 4, "write"),
        ("mov %rax,(%rdi)", 8, "write"),
        ("movq $1,(%rdi)", 8, "write"),
        ("movzbl (%rdi),%eax", 1, "read"),
        ("movzwq (%rdi),%rax", 2, "read"),
        ("movslq (%rdi),%rax", 4, "read"),
        ("xchg %ax,(%rdi)", 2, "read-write"),
        ("lock orl $1,(%rdi)", 4, "read-write"),
        ("cmpl $1,(%rdi)", 4, "read"),
        ("cmpxchg %rcx,(%rdi)", 8, "read-write"),
        ("movdqa (%rdi),%xmm0", 16, "read"),
        ("stosl", 4, "write"),
        ("lodsw", 2, "read"),
        ("insl", 4, "write"),
        ("outsb", 1, "read"),
    ],
)
def test_width_and_direction(assembler, source, width, access):
    found = operand(assembler, source)
    assert (found.width, found.access) == (width, access)


@pytest.mark.parametrize(
    "source", ["push %rax", "call *%rax", "lea (%rdi),%rax", "nopl (%rax)", "ret"]
)
def test_no_operand_that_accesses_memory(assembler, source):
    assert operands.memory_operands(assembler.instruction(source)) == ()


def test_movs_has_two_operands(assembler):
    destination, source = operands.memory_operands(assembler.instruction("rep movsl"))
    assert (destination.base, destination.segment, destination.access) == ("rdi", "es", "write")
    assert (source.base, source.segment, source.access) == ("rsi", "ds", "read")
    assert operands.memory_operand(assembler.instruction("rep movsl")) is None


def test_stack_segments_and_rip(assembler):
    assert operand(assembler, "mov %eax,8(%rsp)").is_stack
    assert operand(assembler, "mov %gs:0x28,%rax").segment == "gs"
    found = operand(assembler, "mov 0x100(%rip),%eax")
    assert found.is_rip_relative
    assert found.displacement == 0x106


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("8b0578563412", "mov @(%rip),%eax"),
        ("e800000000", "call @"),
        ("0f8400000000", "je @"),
        ("48c7c700000082", "mov $@,%rdi"),
        ("48bf00000081ffffffff", "movabs $@,%rdi"),
        ("488b04c540000082", "mov @(,%rax,8),%rax"),
        ("65488b042528000000", "mov %gs:@,%rax"),
        ("8b80000090ff", "mov -0x700000(%rax),%eax"),
        ("8b8700d05fff", "mov @(%rdi),%eax"),
        ("8b4710", "mov 0x10(%rdi),%eax"),
        ("4883e4f0", "and $0xfffffffffffffff0,%rsp"),
        ("f3a4", "rep movsb (%rsi),(%rdi)"),
        ("f0ff4710", "lock incl 0x10(%rdi)"),
        ("0f30", "wrmsr"),
    ],
)
def test_normalised_text(code, expected):
    assert operands.normalise(Decoder(64, bytes.fromhex(code), ip=KERNEL).decode()) == expected


@pytest.mark.parametrize("source", ["mov x(%rip),%eax", "call x", "jne x", "movb $1,x(%rip)"])
def test_normalised_text_does_not_depend_on_the_address(assembler, source):
    texts = set()
    for pad in (0, 64, 4096):
        code = assembler.code(f"{source}\nret\n.fill {pad},1,0x90\nx: .long 0")
        for address in (0, KERNEL, 0xFFFFFFFFC0001230):
            texts.add(operands.normalise(Decoder(64, code, ip=address).decode()))
    assert len(texts) == 1


@given(st.binary(min_size=1, max_size=15), st.integers(0, (1 << 64) - 16))
def test_any_instruction_can_be_written(data, address):
    for instruction in Decoder(64, data, ip=address):
        assert operands.format_instruction(instruction)
        assert operands.normalise(instruction)
        for found in operands.memory_operands(instruction):
            assert found.access in {"read", "write", "read-write"}
            assert found.width >= 0
