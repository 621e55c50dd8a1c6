"""A kernel that is little but entry code: SYSCALL, #VE, an interrupt, NMI; places to plant faults.

It enters and leaves as Linux does (SWAPGS, a stack from a per-CPU variable, sync_regs(), the sign
of GS_BASE for NMIs, TDG.VP.VEINFO.GET), in the fewest instructions that do so.
"""

from pathlib import Path

from tiny_kernel import run

#: Where code can be planted; by default there is none.
PLACES = (
    "syscall_unsafe",  # the kernel's GS, the user's stack
    "syscall_user_gs",  # before SWAPGS
    "syscall_safe",  # on the task's stack
    "syscall_leaving",  # on the user's stack again
    "syscall_last",  # between SWAPGS and SYSRET
    "ve_before_get",  # C, VE_INFO in use
    "ve_after_get",
    "error_user_gs",  # an interrupt from user mode, before SWAPGS
    "error_kernel_gs",  # behind it, on the entry stack
    "iret_leaving",  # from the task's stack, GS is the kernel's
    "iret_last",  # between SWAPGS and IRET
    "nmi_unknown_gs",
    "nmi_handler",
    "elsewhere",  # functions and data of the test's own
)

_SOURCE = """
.set user_rsp, 0x6014
.set stack_top, 0x35018
.macro FUNC name
    .globl \\name
    .type \\name, @function
    \\name:
.endm
.macro DONE name
    .size \\name, . - \\name
.endm
.macro GATE vector, ist, stub
    .pushsection .rodata, "a"
    .balign 8
    .long \\vector, 0x10
    .quad 0x8e00 + \\ist
    .quad \\stub
    .popsection
.endm
.macro ALTERNATIVE_AT old, end, new, newend, feature
    .pushsection .altinstructions, "a"
    .long \\old - ., \\new - .
    .4byte \\feature
    .byte \\end - \\old, \\newend - \\new
    .popsection
.endm
.macro STUB name, handler
FUNC \\name
    push $-1
    call error_entry
    mov %rax, %rsp
    mov %rsp, %rdi
    call \\handler
    jmp error_return
DONE \\name
.endm

.section .entry.text, "ax"
.globl __entry_text_start
__entry_text_start:
FUNC entry_SYSCALL_64
{syscall_user_gs}
    swapgs
    mov %rsp, %gs:user_rsp
{syscall_unsafe}
    mov %gs:stack_top, %rsp
    push $0x2b
    push %gs:user_rsp
    push %r11
    push $0x33
    push %rcx
{syscall_safe}
    call do_syscall
    pop %rcx
    add $8, %rsp
    pop %r11
    pop %rsp
{syscall_leaving}
    swapgs
{syscall_last}
    sysretq
DONE entry_SYSCALL_64

FUNC error_entry
    testb $3, 0x18(%rsp)
    jz 1f
{error_user_gs}
    swapgs
{error_kernel_gs}
    lea 8(%rsp), %rdi
    jmp sync_regs
1:  lea 8(%rsp), %rax
    ret
DONE error_entry

FUNC error_return
    testb $3, 0x10(%rsp)
    jz 2f
{iret_leaving}
    add $8, %rsp
    swapgs
{iret_last}
    iretq
2:  add $8, %rsp
    iretq
DONE error_return

STUB asm_exc_virtualization_exception, exc_ve
STUB asm_sysvec_timer, handler
STUB asm_sysvec_ipi, other_handler

FUNC asm_exc_nmi
    push $-1
    call paranoid_entry
    mov %rsp, %rdi
    call exc_nmi
    test %ebx, %ebx
    jnz 3f
    swapgs
3:  add $8, %rsp
    iretq
DONE asm_exc_nmi

FUNC paranoid_entry
    mov $1, %ebx
    mov $0xc0000101, %ecx
    rdmsr
{nmi_unknown_gs}
    {nmi_test}
    xor %ebx, %ebx
    swapgs
4:  ret
DONE paranoid_entry
.globl __entry_text_end
__entry_text_end:

GATE 20, 0, asm_exc_virtualization_exception
GATE 236, 0, asm_sysvec_timer
GATE 251, 0, asm_sysvec_ipi
GATE 2, 2, asm_exc_nmi

.text
FUNC startup_64
    ret
DONE startup_64
FUNC syscall_init
    mov $0xc0000082, %ecx
    movabs $entry_SYSCALL_64, %rax
    mov %rax, %rdx
    shr $32, %rdx
    wrmsr
    ret
DONE syscall_init
FUNC do_syscall
    ret
DONE do_syscall
FUNC handler
    ret
DONE handler
FUNC other_handler
    hlt
    ret
DONE other_handler
FUNC sync_regs
    mov %gs:stack_top, %rax
    sub $48, %rax
    mov %rdi, %rsi
    mov %rax, %rdi
    mov $6, %ecx
    rep movsq
    ret
DONE sync_regs
FUNC exc_ve
    push %rbx
{ve_before_get}
    mov $3, %eax
    tdcall
{ve_after_get}
    pop %rbx
    ret
DONE exc_ve
FUNC exc_nmi
{nmi_handler}
    ret
DONE exc_nmi
.data
.balign 8
.globl never
never: .quad 0
{elsewhere}
"""
_LINK = """
ENTRY(startup_64)
SECTIONS {
  . = 0xffffffff81000000;
  .text : { *(.text) *(.entry.text) }
  .rodata : { *(.rodata*) }
  .data : { *(.data) *(.bss) }
  .altinstructions : { *(.altinstructions) }
  .altinstr_replacement : { *(.altinstr_replacement) }
  /DISCARD/ : { *(.comment) *(.note.*) }
}
"""
_SIGN = "test %edx, %edx; js 4f"


def build(folder, *, objects=(), nmi_test=_SIGN, **planted):
    """Build the kernel with assembly planted at some of `PLACES`; returns its vmlinux.

    `nmi_test` is what an NMI's entry decides by whether GS is the kernel's. `objects` are linked,
    too.
    """
    assert planted.keys() <= set(PLACES)
    text = _SOURCE.replace("{nmi_test}", nmi_test)
    for place in PLACES:
        text = text.replace(f"{{{place}}}", planted.get(place, ""))
    Path(folder, "entry.S").write_text(text)
    Path(folder, "entry.lds").write_text(_LINK)
    run(folder, "gcc", "-c", "entry.S", "-o", "entry.o")
    run(folder, "ld", "-T", "entry.lds", "--build-id", "-o", "vmlinux", "entry.o", *objects)
    return Path(folder, "vmlinux")
