"""Short guests of ring 0 and ring 3 that execute whatever exits, traps or breaks, at random.

A program is a list of slots, each a few instructions and `ud2`s. Whatever faults goes on with the
next slot, so that one guest tries many things; some take the ground from under it.
"""

import struct
from functools import cache
from random import Random

import hostile
from siege.batches import Kind
from siege.mutate import NUMBERS
from trapline.machine.outcome import OutcomeKind

SLOT = 64
SLOTS = 48
CODE = hostile.FREE
END = CODE + SLOT * SLOTS
ROW = 16 * 8  # registers of a slot
REGISTERS = hostile.TABLE
RING = REGISTERS + ROW * SLOTS
TABLES = 0x700000  # PML4, page directory pointers, a page directory: 1 GiB, for every ring
DESCRIPTORS = 0x710000
TSS = 0x711000
SECONDS = 5

STUB = f"""
        lgdt [rip + gdt_pointer]
        mov ax, 0x28
        ltr ax
        mov rax, {TABLES}
        mov cr3, rax
        .altmacro
        .irp vector, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,28,29,30,31,32,128,255
        gate \\vector, over
        mov byte ptr [rdi + 4], 1       # IST1: slots lose their stacks
        .endr
        load_idt
        jmp next
gdt_pointer: .word 0x37
        .quad {DESCRIPTORS}
position: .quad {CODE - SLOT}
over:   mov eax, 3                      # TDG.VP.VEINFO.GET, whether or not it was a #VE
        tdcall
next:   cld
        mov rsp, STACK - 0x1000
        mov rax, [rip + position]
        add rax, {SLOT}
        mov [rip + position], rax
        mov rcx, {END}
        cmp rax, rcx
        jae done
        xor ecx, ecx
        cmp qword ptr [{RING}], 3
        jne kernel
        push 0x23
        lea rcx, [rsp - 0x800]
        push rcx
        push 0x202
        push 0x1b
        jmp ready
kernel: mov rcx, rsp
        push 0x8
        push rcx
        push 0x2
        push 0x10
ready:  push rax
        sub rax, {CODE}
        shl rax, 1
        lea rax, [rax + {REGISTERS}]
        mov rbx, [rax + 8]
        mov rcx, [rax + 16]
        mov rdx, [rax + 24]
        mov rsi, [rax + 32]
        mov rdi, [rax + 40]
        mov r8, [rax + 48]
        mov r9, [rax + 56]
        mov r10, [rax + 64]
        mov r11, [rax + 72]
        mov r12, [rax + 80]
        mov r13, [rax + 88]
        mov r14, [rax + 96]
        mov r15, [rax + 104]
        mov rbp, [rax + 112]
        mov rax, [rax]
        iretq
done:   power_off
"""

_PLAIN = [
    "0fa2", "f4", "ec", "ed", "ee", "ef", "6c", "6d", "f36c", "f36d", "6e", "6f", "f36e", "0f32",
    "0f30", "0f33", "0f31", "0f01f9", "0f08", "0f09", "0f01c8", "0f01c9", "0f01d1", "0f01d0",
    "0f01c1", "0f01d4", "660f01cc", "660f01cd", "660f01ce", "660f01cf", "0f01d9", "0f05",
    "480f07", "0f07", "0f34", "480f35", "48cf", "cf", "0f0b", "fa", "fb", "fbf4", "f8f4",
    "0f01f8", "0f00d8", "0f00d0", "0f0110", "0f0118", "0f0138", "660f388203", "480f22c0",
    "480f22d8", "480f22e0", "440f22c0", "480f20c1", "480f23f8", "480f23c0", "480f21c0", "488903",
    "488b03", "c60300", "a4", "f348a5", "f348ab", "fdf3a4", "f0480fc70b", "480fc70b", "0fae00",
    "0fae08", "0fae20", "0fae28", "0fae38", "dbe3", "dd00", "c5f877", "0fc7f0", "0f01cb",
    "0f01ca", "ff28", "48ff28", "ff18", "9c9d", "50", "58", "4889c4", "488ec0", "8ee0", "8ed0",
    "0f78c0", "c7f800000000", "0f01d5", "f390", "cb", "48cb", "c8ffff00", "660f6f03", "0f2903",
    "c5fd6f03", "62f17c48280348", "0fc703", "0fae7b10", "660fae38", "f30fb8c0", "0f0d00", "90",
    "f1", "cc", "ce", "d6", "9b", "660f38f803", "f20f38f803", "0f38f903", "0fc733", "660fc733",
    "f30fc733", "0f01c3", "0f01c4", "0f01c2", "e700", "e500", "cd80", "cd03",
]  # fmt: skip
_WITH_BYTE = ("cd", "e4", "e5", "e6", "e7", "0fae", "0f00", "0f01", "0fc7", "660f", "f30f", "0f")


def guests() -> Kind:
    """Make the kind of input that is a guest."""
    return Kind("guests", (_program(Random(0)),), lambda rng, _: _program(rng), _run_twice)


def _program(rng: Random) -> bytes:
    """Make the slots, a row of registers for each, and the ring: what RAM holds from RING on."""
    code = b"".join(_slot(rng) for _ in range(SLOTS))
    rows = b"".join(struct.pack("<16Q", *(_word(rng) for _ in range(16))) for _ in range(SLOTS))
    return code + rows + struct.pack("<Q", rng.choice([0, 0, 3]))


def _slot(rng: Random) -> bytes:
    code = b"".join(_instruction(rng) for _ in range(rng.choice([1, 1, 2, 4])))
    return (code + b"\x0f\x0b" * SLOT)[:SLOT]


def _instruction(rng: Random) -> bytes:
    match rng.randrange(12):
        case 0:
            return rng.randbytes(rng.randint(1, 8))
        case 1 | 2:
            return bytes.fromhex(rng.choice(_WITH_BYTE)) + rng.randbytes(1)
        case 3:  # write into code that runs: this slot's or a later one's
            at = CODE + rng.randrange(SLOT * SLOTS)
            return b"\x48\xbb" + struct.pack("<Q", at) + b"\x48\x89\x03"
        case 4:  # a page table that points at itself, or to nowhere
            at = TABLES + rng.choice([0, 0x1000, 0x2000]) + 8 * rng.randrange(16)
            entry = rng.choice([TABLES, TABLES + 0x1000, _word(rng), 0]) | rng.choice([3, 7, 0x87])
            moves = b"\x48\xbb" + struct.pack("<Q", at) + b"\x48\xb8"
            return (
                moves
                + struct.pack("<Q", entry & 2**64 - 1)
                + b"\x48\x89\x03\x0f\x20\xd8\x0f\x22\xd8"
            )
        case _:
            return bytes.fromhex(rng.choice(_PLAIN))


def _word(rng: Random) -> int:
    """Pick a register's value: a leaf, a port, an MSR, an address of the guest's or of none."""
    return rng.choice(
        [
            rng.randrange(32),
            rng.randrange(0x10000, 0x10010),
            rng.getrandbits(16),
            rng.choice([0x10, 0x1B, 0x174, 0x277, 0x6E0, 0x808, 0x830, 0xC0000080, 0xC0000100]),
            0x40000000 | rng.getrandbits(12),
            rng.choice(NUMBERS),
            hostile.FREE + 0x1000 * rng.randrange(1024),
            hostile.STACK,
            1 << 51 | hostile.FREE,
            rng.choice([0xFEE00000, 0xFEC00000, 0xFED00000, 0xE0000000, 0xFFFFFFF0])
            + 8 * rng.randrange(64),
            0x3F8,
            rng.getrandbits(64),
        ]
    ) & (2**64 - 1)


def _run_twice(program: bytes) -> None:
    first, second = _ended(program), _ended(program)
    if OutcomeKind.TIMEOUT not in {first[0], second[0]}:
        assert first == second, f"not the same twice: {first} and {second}"


def _ended(program: bytes) -> tuple[OutcomeKind, str, int, str]:
    machine = hostile.machine_of(STUB, seconds=SECONDS, virtual_seconds=1, console_limit=1 << 16)
    try:
        ram, cut = machine.memory.ram, SLOT * SLOTS
        ram[CODE : CODE + cut] = program[:cut]
        ram[REGISTERS : REGISTERS + len(program) - cut] = program[cut:]
        for at, data in _tables().items():
            ram[at : at + len(data)] = data
        outcome = machine.run()
        assert outcome.kind is not OutcomeKind.DEVICES_DIED
        return outcome.kind, outcome.detail, outcome.cycles, machine.recorder.digest
    finally:
        machine.close()


@cache
def _tables() -> dict[int, bytes]:
    """Page tables of 2 MiB pages for every ring, the last ones shared; segments and a TSS."""
    pages = [at << 21 | 0x87 for at in range(hostile.MEMORY >> 21)]
    pages += [0xFE000000 + (at << 21) | 1 << 51 | 0x97 for at in range(512 - len(pages))]
    task = (TSS & 0xFFFFFF) << 16 | 0x67 | 0x89 << 40 | (TSS >> 24) << 56
    segments = (0, 0xCF93000000FFFF, 0xAF9B000000FFFF, 0xAFFB000000FFFF, 0xCFF3000000FFFF, task, 0)
    return {
        TABLES: struct.pack("<Q", TABLES + 0x1000 | 7),
        TABLES + 0x1000: struct.pack("<Q", TABLES + 0x2000 | 7),
        TABLES + 0x2000: struct.pack("<512Q", *pages),
        DESCRIPTORS: struct.pack("<7Q", *segments),
        TSS: struct.pack("<IQ", 0, hostile.STACK - 0x2000).ljust(36, b"\0")
        + struct.pack("<Q", hostile.STACK - 0x3000).ljust(68, b"\0"),
    }
