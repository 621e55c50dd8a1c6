"""The classes of what traps: one set for all commands, and the parts of it that some are about."""

from typing import Final, Literal, get_args

TrapClass = Literal[
    "mmio",
    "pio",
    "msr",
    "cpuid",
    "hlt",
    "mwait",
    "monitor",
    "wbinvd",
    "cr",
    "tdcall",
    "vmcall",
    "rdpmc",
    "encls",
    "xsetbv",
    "other",
]
#: What a #VE handler may emulate.
EmulatedClass = Literal["mmio", "pio", "cpuid", "msr", "hlt"]
#: What a guest can do otherwise, or without: what a policy is about.
PolicyClass = Literal["mmio", "pio", "msr", "cpuid"]

TRAP_CLASSES: Final[tuple[TrapClass, ...]] = get_args(TrapClass)
EMULATED_CLASSES: Final[tuple[EmulatedClass, ...]] = get_args(EmulatedClass)
POLICY_CLASSES: Final[tuple[PolicyClass, ...]] = get_args(PolicyClass)
