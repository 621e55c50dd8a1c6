"""Guests of a hundred instructions with one known hole each, or without it.

A guest is a vmlinux as trapline sees it: ELF, linked at kernel addresses, with the names that
Linux has for the functions the explorer watches for. It enters user mode, makes system calls,
and powers off. `hole` is assembled in place of the sound code; `None` is the sound twin.
"""

import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from trapline.explore import scenario
from trapline.explore.course import Run
from trapline.explore.inject import Injector
from trapline.explore.triggers import Triggers
from trapline.explore.window import LiveWindow
from trapline.guest.target import Target, TargetSource
from trapline.machine.devices.power import PORT, SLP_EN, SLP_TYP_S5, SLP_TYP_SHIFT

MEMORY = 32 << 20

_SOURCE = f"""
        .intel_syntax noprefix
        .set BASE, 0xffffffff80000000
        .set USER_STACK, 0x5ff000
        .set WP, 1 << 16
        .macro tdcall
        .byte 0x66, 0x0f, 0x01, 0xcc
        .endm
        .macro variable name, size=8
        .balign 16
        .globl \\name
        .type \\name, @object
        .size \\name, \\size
\\name: .zero \\size
        .endm
        .macro function name
        .globl \\name
        .type \\name, @function
\\name:
        .endm
        .macro write_msr index, symbol
        mov ecx, \\index
        lea rax, [rip + \\symbol]
        mov rdx, rax
        shr rdx, 32
        wrmsr
        .endm
        .macro gate vector, handler, ist=0
        lea rax, [rip + \\handler]
        lea rdi, [rip + idt + 16 * \\vector]
        mov [rdi], ax
        mov word ptr [rdi + 2], 8
        mov byte ptr [rdi + 4], \\ist
        mov byte ptr [rdi + 5], 0x8e
        shr rax, 16
        mov [rdi + 6], ax
        shr rax, 16
        mov [rdi + 8], eax
        .endm
        # RBX = 1 if the GS base was the user's; it is the kernel's then.
        .macro paranoid_entry
        push rax
        push rcx
        push rdx
        push rbx
        xor ebx, ebx
        .ifndef NO_PARANOIA
        mov ecx, 0xc0000101
        rdmsr
        test edx, edx
        js 77f
        swapgs
        inc ebx
77:
        .endif
        .endm
        .macro paranoid_exit
        test ebx, ebx
        jz 78f
        swapgs
78:     pop rbx
        pop rdx
        pop rcx
        pop rax
        iretq
        .endm

        # Off the stack that the next NMI's frame goes to: below what the first interrupted.
        .macro copy_frame
        push rax
        push rbx
        mov rax, [rsp + 40]
        and rax, -16
        .irp word, 1, 2, 3, 4, 5
        mov rbx, [rsp + 56 - 8 * \\word]
        mov [rax - 8 * \\word], rbx
        .endr
        mov rbx, [rsp]
        mov [rax - 48], rbx
        mov rbx, [rsp + 8]
        mov [rax - 56], rbx
        lea rsp, [rax - 56]
        pop rax
        pop rbx
        .endm

        .text
        .globl phys_start
        .set phys_start, _start - BASE
        .globl phys_start
_start: lea rax, [rip + pml4]
        mov cr3, rax
        movabs rax, offset high
        jmp rax
high:   lea rsp, [rip + kstack_top]
        .ifdef PROTECTED
        mov rax, cr0
        or rax, WP
        mov cr0, rax
        .endif
        lgdt [rip + gdt_pointer]
        lea rax, [rip + tss]
        mov [rip + gdt + 0x32], ax
        shr rax, 16
        mov [rip + gdt + 0x34], al
        mov [rip + gdt + 0x37], ah
        shr rax, 16
        mov [rip + gdt + 0x38], eax
        push 8
        lea rax, [rip + reloaded]
        push rax
        retfq
reloaded:
        mov eax, 0x10
        mov ss, eax
        mov ds, eax
        mov es, eax
        lea rax, [rip + kstack_top]
        mov [rip + tss + 4], rax
        lea rax, [rip + nmi_stack_top]
        mov [rip + tss + 36], rax
        lea rax, [rip + ve_stack_top]
        mov [rip + tss + 44], rax
        lea rax, [rip + df_stack_top]
        mov [rip + tss + 52], rax
        mov eax, 0x30
        ltr ax
        gate 2, asm_exc_nmi, 1
        gate 8, asm_exc_double_fault, 3
        .ifdef IRQ_IN_C
        gate 0x40, asm_planted
        .else
        gate 0x40, asm_common_interrupt
        .endif
        .ifdef MORE_VECTORS
        gate 0x50, stub_50
        gate 0x51, stub_51
        .endif
        .ifdef STUCK_VECTOR
        gate 0x60, stuck
        .endif
        .ifdef VE_ON_IST
        gate 20, asm_exc_virtualization_exception, 2
        .else
        gate 20, asm_exc_virtualization_exception
        .endif
        lidt [rip + idt_pointer]
        mov ecx, 0xc0000080
        rdmsr
        or eax, 1
        wrmsr
        mov ecx, 0xc0000081
        xor eax, eax
        mov edx, 0x001b0008
        wrmsr
        write_msr 0xc0000082, entry_SYSCALL_64
        mov ecx, 0xc0000084
        mov eax, 0x700
        xor edx, edx
        wrmsr
        write_msr 0xc0000102, percpu
        mov ecx, 0xc0000101
        xor eax, eax
        xor edx, edx
        wrmsr
        lea rax, [rip + kstack_top]
        mov [rip + percpu], rax
        push 0x23
        push USER_STACK
        push 0x202
        push 0x2b
        push 0x400000
        iretq

        .ifdef PADDED
        .space 100, 0x90
        .endif
        function entry_SYSCALL_64
        swapgs
        .ifdef GAP_TRAPS
        mov r9, rcx
        mov r10, rax
        mov eax, 0x40000000
        cpuid
        mov rax, r10
        mov rcx, r9
        .endif
        mov gs:[8], rsp
        mov rsp, gs:[0]
        push rcx
        push r11
        cmp eax, 60
        je power_off
        call do_syscall_64
        pop r11
        pop rcx
        mov rsp, gs:[8]
        swapgs
        sysretq
        .size entry_SYSCALL_64, . - entry_SYSCALL_64

        function do_syscall_64
        .ifdef PADDED
        nop
        .endif
        mov byte ptr [rip + busy], 1
        .ifdef DIES_IN_FOURTH_CALL
        cmp qword ptr [rip + counter], 3
        jne 6f
        .ifdef PANICS
        call panic
        .endif
        .ifdef LOOPS
        jmp .
        .endif
        .ifdef SWITCHES_OFF
        jmp power_off
        .endif
        .ifdef LOSES_STACK
        mov rsp, 16
        .endif
        .ifdef LOSES_IDT
        lidt [rip + zeros]
        .endif
        ud2
6:
        .endif
        .ifdef OPEN
        sti
        .space 24, 0x90
        .endif
        .ifdef TORN_COUNTER
        mov rcx, [rip + counter]
        add rcx, 1
        mov [rip + counter], rcx
        .else
        add qword ptr [rip + counter], 1
        .endif
        .ifdef OPEN
        .space 24, 0x90
        cli
        .endif
        mov byte ptr [rip + busy], 0
        .ifdef WORKS
        sti
        call work
        cli
        .endif
        .ifdef TRAP
        push rbx
        mov eax, 0x40000000
        .ifndef MASKED
        sti
        .endif
        cpuid
        cli
        pop rbx
        .endif
        ret
        .size do_syscall_64, . - do_syscall_64

        function work
        nop
        nop
        ret
        .size work, . - work

power_off:
        xor eax, eax
        xor r10d, r10d
        mov r11d, 30
        mov ecx, 0xfc00
        mov r12d, 1
        mov r13d, 1
        mov r14d, {PORT}
        mov r15d, {SLP_EN | SLP_TYP_S5 << SLP_TYP_SHIFT}
        tdcall
        hlt

        function asm_exc_nmi
        .ifdef NMI_COPIES
        copy_frame
        .endif
        paranoid_entry
        call exc_nmi
        .ifdef NO_IRET
        # Back without IRET: NMIs stay blocked for ever.
        mov rax, [rsp + 32]
        mov rcx, [rsp + 56]
        mov [rcx - 8], rax
        push qword ptr [rsp + 48]
        popfq
        pop rbx
        pop rdx
        sub rcx, 8
        mov rax, [rsp + 8]
        mov [rcx - 8], rax
        mov rax, [rsp]
        lea rsp, [rcx - 8]
        mov rcx, rax
        pop rax
        ret
        .endif
        paranoid_exit

        function exc_nmi
        .ifdef NMI_SPINS
1:      cmp byte ptr [rip + busy], 0
        jne 1b
        .endif
        .ifdef NMI_PANICS
        cmp byte ptr [rip + busy], 0
        jne panic
        .endif
        .ifdef NMI_OOPSES
        cmp byte ptr [rip + busy], 0
        je 4f
        nop
        call oops_begin
4:
        .endif
        .ifdef NMI_LOST
        cmp byte ptr [rip + busy], 0
        jne 2f
        .endif
        inc qword ptr [rip + nmi_count]
2:
        .ifdef NMI_CALLS_USER
        cmp byte ptr [rip + busy], 0
        je 5f
        mov eax, 0x400000
        call rax
5:
        .endif
        .ifdef NMI_SCRIBBLES
        cmp byte ptr [rip + busy], 0
        je 3f
        mov byte ptr [rip + bystander], 7
3:
        .endif
        .ifdef NMI_TRAPS
        push rbx
        mov eax, 0x40000000
        cpuid
        pop rbx
        .endif
        .ifdef NMI_OPENS
        sti
        nop
        nop
        cli
        .endif
        .ifdef NMI_WRITES_TEXT
        cmp byte ptr [rip + busy], 0
        je 7f
        mov rax, cr0
        and rax, ~WP
        mov cr0, rax
        mov cl, [rip + power_off]
        mov [rip + power_off], cl
        or rax, WP
        mov cr0, rax
7:
        .endif
        .ifdef NMI_FAULTS
        mov cr2, rsp
        .endif
        .ifdef NMI_COUNTS
        inc qword ptr [rip + counter]
        .endif
        .ifdef NMI_TAKES_TIME
        rdtsc
        shl rdx, 32
        or rax, rdx
        mov [rip + stamp], rax
        .endif
        .ifdef NMI_MEASURES
        rdtsc
        mov ecx, eax
        rdtsc
        sub eax, ecx
        mov [rip + stamp], eax
        .endif
        .ifdef NMI_KEEPS_RIP
        mov rax, [rsp + 40]
        mov [rip + stamp], rax
        .endif
        .ifdef NMI_KEEPS_FLAGS
        mov rax, [rsp + 56]
        mov [rip + stamp], rax
        .endif
        .ifdef NMI_KEEPS_RSP
        mov rax, [rsp + 64]
        mov [rip + stamp], rax
        .endif
        .ifdef NMI_WRITES_USER
        inc qword ptr [0x500000]
        .endif
        .ifdef NMI_WRITES_TABLE
        add qword ptr [rip + pd_low + 4088], 2
        .endif
        .ifdef NMI_WRITES_IDT
        inc dword ptr [rip + idt + 16 * 200 + 12]
        .endif
        .ifdef NMI_SETS_DF
        or dword ptr [rsp + 56], 0x400
        .endif
        .ifdef NMI_CUTS_IDT
        push 0
        push 0
        sidt [rsp]
        sub word ptr [rsp], 16
        lidt [rsp]
        add rsp, 16
        .endif
        .ifdef NMI_USES_FPU
        fld1
        .endif
        .ifdef NMI_WRITES_DR
        mov dr0, rsp
        .endif
        ret
        .size exc_nmi, . - exc_nmi

        .ifdef NMI_OOPSES
        function oops_begin
        mov ecx, 300
5:      dec ecx
        jnz 5b
        ret
        .endif

        function panic
        cli
        hlt
        jmp panic
        .size panic, . - panic

asm_exc_double_fault:
        jmp panic

        function asm_common_interrupt
        push rax
        push rcx
        push rdx
        push rbx
        .ifdef IRQ_TRAPS
        mov eax, 0x40000000
        cpuid
        .endif
        .ifdef IRQ_FAULTS
        mov cr2, rsp
        .endif
        .ifdef IRQ_LOSES_R11
        xor r11d, r11d
        .endif
        .ifdef IRQ_SETS_DF
        or dword ptr [rsp + 48], 0x400
        .endif
        .ifdef BUSY_IN_IRQ
        mov byte ptr [rip + busy], 1
        .endif
        inc qword ptr [rip + irq_count]
        .ifndef IRQ_WITHOUT_EOI
        mov ecx, 0x80b
        xor eax, eax
        xor edx, edx
        wrmsr
        .endif
        mov byte ptr [rip + busy], 0
        pop rbx
        pop rdx
        pop rcx
        pop rax
        iretq

        .ifdef MORE_VECTORS
stub_50: push 0x50
        jmp behind_stubs
stub_51: push 0x51
        jmp behind_stubs
behind_stubs:
        add rsp, 8
        jmp asm_common_interrupt
        .endif
stuck:
        .ifdef STUCK_TRAPS
        mov eax, 0x40000000
        cpuid
        .endif
        jmp stuck

        # Handlers in C: one that only its stub's name tells, one that only its own does.
        .macro swap_for_user hole
        .ifndef \\hole
        test byte ptr [rsp + 40], 3
        jz 79f
        swapgs
79:
        .endif
        .endm
        function asm_planted
        push rax
        push rcx
        push rdx
        push rbx
        swap_for_user GS_OF_PLANTED
        call planted
        swap_for_user GS_OF_PLANTED
        swap_for_user GS_OF_SYSVEC
        call sysvec_planted
        swap_for_user GS_OF_SYSVEC
        pop rbx
        pop rdx
        pop rcx
        pop rax
        iretq
        .ifdef ENTRY_TEXT
        .globl __entry_text_start, __entry_text_end
        .set __entry_text_start, asm_planted
        .set __entry_text_end, planted
        .endif
        function planted
        ret
        .size planted, . - planted
        function sysvec_planted
        inc qword ptr [rip + irq_count]
        mov ecx, 0x80b
        xor eax, eax
        xor edx, edx
        wrmsr
        ret
        .size sysvec_planted, . - sysvec_planted

        function asm_exc_virtualization_exception
        paranoid_entry
        push rsi
        push rdi
        push r8
        push r9
        push r10
        push r11
        push r12
        push r13
        push r14
        push r15
        call exc_virtualization_exception
        add [rsp + 14 * 8], rax
        pop r15
        pop r14
        pop r13
        pop r12
        pop r11
        pop r10
        pop r9
        pop r8
        pop rdi
        pop rsi
        paranoid_exit

        # Returns the length of the instruction.
        function exc_virtualization_exception
        .ifdef VE_TOUCHES
        inc qword ptr [rip + bystander]
        .endif
        .ifdef VE_UNREAD
        cmp byte ptr [rip + busy], 0
        je 8f
        xor eax, eax
        ret
8:
        .endif
        .ifdef EARLY_STI
        sti
        nop
        nop
        cli
        .endif
        mov eax, 3
        tdcall
        .ifdef CONDITIONAL_STI
        test dword ptr [rsp + 17 * 8], 0x200
        jz 9f
        .endif
        .ifndef EARLY_STI
        sti
        nop
        nop
        cli
        .endif
9:
        mov esi, r10d
        push rsi
        cmp ecx, 32
        je ve_wrmsr
        cmp ecx, 10
        jne panic
        mov r11d, 10
        mov r12d, 0x40000000
        xor r13d, r13d
        jmp call_host
ve_wrmsr:
        mov r11d, 32
        mov r12, [rsp + 16 + 12 * 8]
        mov r13, [rsp + 16 + 11 * 8]
        shl r13, 32
        mov r10d, [rsp + 16 + 13 * 8]
        or r13, r10
        mov r12d, r12d
call_host:
        xor eax, eax
        xor r10d, r10d
        mov ecx, 0xfc00
        tdcall
        pop rax
        ret
        .size exc_virtualization_exception, . - exc_virtualization_exception

        .section .rodata
        .asciz "tdx: Guest detected"

        .data
        .balign 4096
pml4:   .quad pdpt_low - BASE + 7
        .zero 510 * 8
        .quad pdpt_high - BASE + 3
pdpt_low:
        .quad pd_low - BASE + 7
        .zero 511 * 8
pdpt_high:
        .zero 510 * 8
        .quad pd_high - BASE + 3
        .zero 8
pd_low: .quad 0
        .quad 0x200083
        .quad 0x600087
        .zero 509 * 8
pd_high:
        .set at, 0
        .rept 16
        .ifdef PROTECTED
        .quad at + 0x83 - 2 * (at == 0x200000)
        .else
        .quad at + 0x83
        .endif
        .set at, at + 0x200000
        .endr
        .zero 496 * 8
gdt:    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0, 0x00cff3000000ffff
        .quad 0x00affb000000ffff, 0x0000890000000067, 0
gdt_pointer:
        .word 63
        .quad gdt
idt_pointer:
        .word 0xfff
        .quad idt
        .balign 16
idt:    .zero 4096
tss:    .zero 104
zeros:  .zero 16
        variable percpu, 64
        variable counter
        variable busy
        variable bystander
        variable stamp
        variable nmi_count
        variable irq_count
        .balign 4096
        .globl __start_init_stack, __end_init_stack
__start_init_stack:
        variable kstack, 4096
__end_init_stack:
kstack_top:
        variable nmi_stack, 4096
nmi_stack_top:
        variable ve_stack, 4096
ve_stack_top:
        variable df_stack, 4096
df_stack_top:

        .section .user, "awx"
        mov ebp, 12
again:
        .ifdef USER_TRAPS
        mov eax, 0x40000000
        cpuid
        .endif
        mov eax, 39
        syscall
        dec ebp
        jnz again
        mov eax, 60
        syscall
        hlt
"""

_LINK = """
ENTRY(phys_start)
PHDRS { kernel PT_LOAD; user PT_LOAD; }
SECTIONS {
  . = 0xffffffff80200000;
  .text : AT(0x200000) { *(.text) } :kernel
  .rodata : { *(.rodata) *(.note.*) } :kernel
  . = ALIGN(0x200000);
  .data : { *(.data) } :kernel
  . = 0x400000;
  .user : AT(0x600000) { *(.user) } :user
}
"""

SYSCALL = """
title = "test"
[start]
syscall = 39
nth = 4
[[inject]]
event = "nmi"
"""
TRAP = """
title = "test"
[start]
trap = "cpuid"
nth = 2
[[inject]]
event = "irq:0x40"
"""


_folders = []  # removed when the process ends


@cache
def build(flags):
    """Assemble and link a guest with the given symbols defined; returns the path."""
    _folders.append(TemporaryDirectory(prefix="trapline-guest-"))
    folder = Path(_folders[-1].name)
    (folder / "guest.s").write_text(_SOURCE)
    (folder / "guest.lds").write_text(_LINK)
    defines = [f"--defsym={flag}=1" for flag in flags]
    for command in (
        ["as", *defines, "-o", "guest.o", "guest.s"],
        [
            "ld",
            "-T",
            "guest.lds",
            "--no-warn-rwx-segments",
            "--build-id",
            "-o",
            "vmlinux",
            "guest.o",
        ],
    ):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder / "vmlinux"


def source(*flags):
    """Describe a guest, as a campaign is given it."""
    return TargetSource(
        kernel="guest",
        vmlinux=build(tuple(flags)),
        initrd=b"",
        memory=MEMORY,
        command_line="",
    )


class Opened:
    """A guest at the start of a window, with an injector."""

    def __init__(self, text, *flags, budget=20_000):
        self.target = Target(source(*flags))
        self.machine = self.target.machine("")
        scenarios = [scenario.parse(text.encode(), "test.toml", "test")]
        self.triggers = Triggers(self.machine, self.target, scenarios)
        opening = self.triggers.next()
        assert opening is not None, self.machine.host.outcome
        self.window = LiveWindow(self.machine, self.target, opening)
        self.injector = Injector(self.window, "trapline explore guest", budget=budget)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.machine.close()
        self.target.binary.close()

    def run(self, event, boundary, nested=None, nested_at=None):
        return self.injector.run(Run(event, boundary, nested, nested_at))

    def at(self, instruction):
        """Give the first boundary before that instruction."""
        return next(b.index for b in self.window.boundaries if b.instruction == instruction)

    def all(self, event):
        return [self.run(event, boundary) for boundary in range(len(self.window.steps))]

    def verdicts(self, event):
        """Map verdict to the instructions before which it was given."""
        found = {}
        for result in self.all(event):
            text = self.window.boundaries[result.boundary].instruction
            found.setdefault(result.verdict, []).append(text)
        return found


def explore(text, event, *flags, **options):
    """Inject one event at all boundaries; verdict -> instructions."""
    with Opened(text, *flags, **options) as opened:
        return opened.verdicts(event)
