"""The symbols of Linux that trapline asks a kernel for by name.

Where a kernel has none of a name, whoever asks does without, or says what cannot be told.
"""

import re
from dataclasses import dataclass
from typing import Final

BANNER: Final = "linux_banner"  # init/version.c: says where KASLR put the kernel
MODULES: Final = "modules"  # kernel/module/main.c: the list of loaded modules
INIT_TASK: Final = "init_task"  # init/init_task.c: the first of the list of tasks
PCI_BUSES: Final = "pci_root_buses"  # drivers/pci/probe.c: the list of PCI buses

# kernel/printk/printk.c: each message goes through it, whoever prints and whether a console shows
# it. Around it are those through which one comes there.
PRINTK: Final = "vprintk_emit"
PRINTING: Final = frozenset(
    {PRINTK, "vprintk", "vprintk_default", "vprintk_deferred", "_printk", "_printk_deferred"}
)
# Entered by a kernel that gives up on what trapped: an oops, a panic, a signal.
REFUSALS: Final = ("oops_begin", "die_addr", "panic", "force_sig_fault", "force_sig")
# The first system call of init: process context, kernel stack and page tables.
SYSTEM_CALL: Final = "do_syscall_64"
# Reached on the way to /init: symbol -> what the milestone is called.
MILESTONES: Final = {
    "start_kernel": "start_kernel",
    "do_one_initcall": "first initcall",
}
# Called to set up the gates of the IDT; before, only the early ones are there (init/main.c).
GATES_SET_UP: Final = "trap_init"
# First and last symbol of the code that must not be instrumented (vmlinux.lds.S): an event there
# meets a kernel that is half entered.
ENTRY_TEXT: Final = (
    ("__entry_text_start", "__entry_text_end"),
    ("__noinstr_text_start", "__noinstr_text_end"),
    ("__irqentry_text_start", "__irqentry_text_end"),
)
# Code jumps here in place of RET (arch/x86/lib/retpoline.S; apply_returns() patches it), and calls
# or jumps here in place of a branch to a register.
RETURN_THUNK: Final = "__x86_return_thunk"
INDIRECT_THUNKS: Final = (
    "__x86_indirect_thunk_",
    "__x86_indirect_call_thunk_",
    "__x86_indirect_jump_thunk_",
)
# What a static call goes through (include/linux/static_call_types.h).
STATIC_CALL: Final = "__SCT__"
# Functions that tell somebody: what they reach is consoles, locks and much else.
REPORTS: Final = (
    *("_printk", "__warn_printk", "panic", "vpanic", "early_printk", "nmi_panic", "die"),
    "__stack_chk_fail",
)
# Arrays of the bases of per-CPU areas (mm/percpu.c, arch/x86/kernel/setup_percpu.c); the second
# is what a kernel without SMP has (GET_PERCPU_BASE in arch/x86/entry/calling.h).
PERCPU_BASES: Final = ("__per_cpu_offset", "pcpu_unit_offsets")
# Where a new task begins: since and before v6.6 (3aec4ecb3d1f).
NEW_TASK: Final = ("ret_from_fork_asm", "ret_from_fork")
# Gates before the IDT is complete: an array of stubs for vectors 0 to 31, and what comes behind it
# (head_64.S).
EARLY_GATES: Final = ("early_idt_handler_array", "early_idt_handler_common")
# Arrays of stubs, one for each vector of a device (idt_setup_apic_and_irq_gates()).
STUB_ARRAYS: Final = ("irq_entries_start", "spurious_entries_start")
# What is not written once the kernel runs.
FIXED: Final = {
    "kernel text": ("_stext", "_etext"),
    "read-only data": ("__start_rodata", "__end_rodata"),
}
# Where events go on a processor with FRED, in a kernel that has it built in (v6.9).
FRED_ENTRIES: Final = ("asm_fred_entrypoint_user", "asm_fred_entrypoint_kernel")
# The first task's stack is as large as any task's (INIT_TASK_DATA, before and since v6.10).
INIT_STACK: Final = (
    ("__start_init_stack", "__end_init_stack"),
    ("__start_init_task", "__end_init_task"),
)


@dataclass(frozen=True, slots=True)
class KernelNames:
    """The functions that the explorer watches for, as of 5.19 to 7.0.

    `syscall` is where SYSCALL goes. `oops` and `panic` are entered by a kernel that gives up on
    a task or on itself. What `handlers` matches is C code that entry code calls for an event, and
    runs with the kernel's GS base: the names that DEFINE_IDTENTRY() and its kin give
    (arch/x86/include/asm/idtentry.h), and what else has an `asm_` stub.
    """

    syscall: str = "entry_SYSCALL_64"
    oops: tuple[str, ...] = ("oops_begin",)
    panic: tuple[str, ...] = ("panic", "nmi_panic")
    handlers: re.Pattern[str] = re.compile(
        r"(?:noist_|user_|kernel_)?exc_\w+|sysvec_\w+|(?:common|spurious)_interrupt"
        r"|(?:do_)?int80_emulation|do_int80_syscall_32"
    )
    stub: str = "asm_"
    # What the gate of vector 0x80 leads to: since v6.7, before that, and with FRED's way to it.
    int80: re.Pattern[str] = re.compile(r"asm_(?:fred_)?int80_emulation|entry_INT80_(?:compat|32)")
