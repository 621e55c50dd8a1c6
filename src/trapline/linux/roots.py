"""Where Linux is when a trap must not land, or had better not: what each context starts in.

The names are those of the entry code and of `struct console`, which the rest of the kernel goes by
(arch/x86/include/asm/idtentry.h, include/linux/console.h).
"""

from typing import Final, NamedTuple


class Root(NamedTuple):
    """One context: the functions it starts in, or the members of a struct that point to them.

    `until`: only what runs before a call of one of these; `after`: only what runs behind it.
    `forbidden`: no trap may land there; `why` is the reason, with its source.
    """

    id: str
    title: str
    functions: tuple[str, ...]
    why: str
    forbidden: bool = False
    until: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    members: tuple[tuple[str, str], ...] = ()
    sections: tuple[str, ...] = ()


# Until v6.6, and where it is inlined, the C wrapper is not there: the call of the module is.
_VEINFO_GET: Final = ("tdx_get_ve_info", "__tdcall_ret", "__tdcall", "__tdx_module_call")
_IDT_READY: Final = ("idt_setup_early_handler",)

#: The context of console drivers, to which others may lead.
CONSOLE: Final = "console"

ROOTS: Final = (
    Root(
        "ve-before",
        "#VE handler before TDG.VP.VEINFO.GET",
        ("exc_virtualization_exception",),
        "VE_INFO is in use: the TDX module turns a second #VE into #DF or a TD exit"
        " (`trapline rules explain second-ve`)",
        forbidden=True,
        until=_VEINFO_GET,
    ),
    Root(
        "ve-after",
        "#VE handler after TDG.VP.VEINFO.GET",
        ("exc_virtualization_exception",),
        "a second #VE is delivered like the first, on the same stack; one for each #VE never ends",
        after=_VEINFO_GET,
    ),
    Root(
        "nmi",
        "NMI handlers",
        ("exc_nmi",),
        "#VE is allowed once the kernel is ready for nested NMIs: the IRET of the #VE handler"
        " unblocks them (comment above exc_virtualization_exception, arch/x86/kernel/traps.c)",
        members=(("nmiaction", "handler"),),  # register_nmi_handler(), asm/nmi.h
    ),
    Root(
        "machine-check",
        "#MC handler",
        ("exc_machine_check", "noist_exc_machine_check"),
        "on a stack of its own (IST), which a second #MC would overwrite",
    ),
    Root(
        "debug",
        "#DB handler",
        ("exc_debug", "noist_exc_debug"),
        "on a stack of its own (IST), which a second #DB would overwrite",
    ),
    Root("int3", "INT3 handler", ("exc_int3",), "anywhere in the kernel that a probe was put"),
    Root(
        CONSOLE,
        "console drivers, from any context",
        (),
        "printk may be called anywhere; write_atomic() runs in NMIs (include/linux/console.h)",
        members=(("console", "write"), ("console", "write_atomic"), ("console", "write_thread")),
    ),
    Root(
        "early",
        "early code before the IDT",
        ("x86_64_start_kernel",),
        "there is no #VE handler yet (idt_setup_early_handler(), arch/x86/kernel/idt.c)",
        forbidden=True,
        until=_IDT_READY,
    ),
    Root(
        "noinstr",
        "code that is not instrumented",
        (),
        "runs where the kernel is half entered, too; the gaps say where it may not trap",
        sections=(".noinstr.text", ".entry.text"),
    ),
    Root("panic", "panic", ("panic",), "the kernel says its last words"),
    Root("idle", "idle loop", ("do_idle",), "HLT and MWAIT are meant to leave the guest"),
)
#: What a context that the user names is held to.
NAMED_WHY: Final = "named with --from, and so held free of traps"
