"""Guests that mean harm: assembled, put into a machine, and run to their end."""

from flatcode import assemble
from trapline.cpu.default import open_engine
from trapline.machine.devices.power import PORT, SLP_EN, SLP_TYP_S5, SLP_TYP_SHIFT
from trapline.machine.loader.kernelimage import KernelImage, Piece
from trapline.machine.machine import Machine, MachineConfig

MEMORY = 32 << 20
CODE = 0x200000
IDT = 0x400000
STACK = 0x500000
TABLE = 0x600000
FREE = 0x800000  # nothing of the guest's own is from here on
SECONDS = 20

PRELUDE = f"""
        .intel_syntax noprefix
        .set IDT, {IDT}
        .set STACK, {STACK}
        .set TABLE, {TABLE}
        .macro tdcall
        .byte 0x66, 0x0f, 0x01, 0xcc
        .endm
        # GHCI: R10 0, leaf in R11, RCX says which registers the host sees: R10 to R15.
        .macro tdvmcall leaf
        xor eax, eax
        xor r10d, r10d
        mov r11d, \\leaf
        mov ecx, 0xfc00
        tdcall
        .endm
        .macro out_byte port, value
        mov r12d, 1
        mov r13d, 1
        mov r14d, \\port
        mov r15d, \\value
        tdvmcall 30
        .endm
        .macro power_off
        out_byte {PORT}, {SLP_EN | SLP_TYP_S5 << SLP_TYP_SHIFT}
        hlt
        .endm
        # Make `handler` the gate of `vector` in a table at IDT, and load that.
        .macro gate vector, handler
        lea rax, [rip + \\handler]
        mov rdi, IDT + 16 * \\vector
        mov word ptr [rdi], ax
        mov dword ptr [rdi + 2], 0x8e000010
        shr rax, 16
        mov word ptr [rdi + 6], ax
        shr rax, 16
        mov dword ptr [rdi + 8], eax
        .endm
        .macro load_idt
        lidt [rip + idt_pointer]
        .endm
        .text
        .globl _start
_start: mov rsp, STACK
        jmp guest
idt_pointer: .word 0xfff
        .quad IDT
guest:
"""


def machine_of(source: str, table: bytes = b"", factory=open_engine, **options) -> Machine:
    """Build a machine that starts with `source`; `table` is at TABLE."""
    code, _ = assemble(PRELUDE + source, CODE)
    image = KernelImage(
        "vmlinux",
        "guest",
        (Piece(CODE, memoryview(code), len(code)),),
        CODE,
        CODE,
        CODE + len(code),
        b"",
        MEMORY - 1,
        2047,
    )
    settings = {"seconds": SECONDS, "memory": MEMORY, "virtual_seconds": 5} | options
    config = MachineConfig(image=image, command_line="", initrd=b"", **settings)
    machine = Machine(config, factory=factory)
    machine.memory.ram[TABLE : TABLE + len(table)] = table
    return machine


def run(source: str, table: bytes = b"", **options):
    """Run a guest to its end; returns the outcome."""
    machine = machine_of(source, table, **options)
    try:
        return machine.run()
    finally:
        machine.close()
