"""What the TDX module and its surroundings say to each other.

The module calls a `Vmm` at each TD exit, a `VirtualApic` for the x2APIC registers that a TD
reaches without an exit, and a `TrapListener` so that traps can be counted and traced. It is
itself called through `trapline.tdx.module.TdxModule`.

Calls are made from inside `Vcpu.run`'s exit handler: the callee may change any guest state
and returns to let the guest go on. A VMM that wants the guest stopped calls `Vcpu.stop`.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple, Protocol

from trapline.results.trapclass import TrapClass
from trapline.rules.rows import Feature


class ExitReason(IntEnum):
    """Basic VM exit reasons that a TD sees in VE_INFO, or a VMM in a TD exit (SDM 3C, C)."""

    EXCEPTION_OR_NMI = 0
    TRIPLE_FAULT = 2
    TASK_SWITCH = 9
    CPUID = 10
    GETSEC = 11
    HLT = 12
    INVD = 13
    RDPMC = 15
    VMCALL = 18
    CR_ACCESS = 28
    IO_INSTRUCTION = 30
    RDMSR = 31
    WRMSR = 32
    MWAIT = 36
    MONITOR = 39
    EPT_VIOLATION = 48
    EPT_MISCONFIGURATION = 49
    WBINVD = 54
    XSETBV = 55
    APIC_WRITE = 56
    PCONFIG = 65
    TDCALL = 77


_TRAP_CLASSES: Final[dict[int, TrapClass]] = {
    ExitReason.CPUID: "cpuid",
    ExitReason.HLT: "hlt",
    ExitReason.INVD: "wbinvd",
    ExitReason.RDPMC: "rdpmc",
    ExitReason.VMCALL: "vmcall",
    ExitReason.CR_ACCESS: "cr",
    ExitReason.IO_INSTRUCTION: "pio",
    ExitReason.RDMSR: "msr",
    ExitReason.WRMSR: "msr",
    ExitReason.MWAIT: "mwait",
    ExitReason.MONITOR: "monitor",
    ExitReason.EPT_VIOLATION: "mmio",
    ExitReason.WBINVD: "wbinvd",
    ExitReason.XSETBV: "xsetbv",
    ExitReason.TDCALL: "tdcall",
}


def trap_class(reason: int) -> TrapClass:
    """Return the class that results have for an exit reason."""
    return _TRAP_CLASSES.get(reason, "other")


class ExtendedQualification(IntEnum):
    """Type field of the extended exit qualification (module 1.5.01, vmcs_defs.h)."""

    NONE = 0
    ACCEPT = 1  # TDG.MEM.PAGE.ACCEPT found a page that it cannot accept
    ATTRIBUTES_WRITE = 5
    PENDING_EPT_VIOLATION = 6


class TdExit(NamedTuple):
    """An asynchronous TD exit, as TDH.VP.ENTER returns it to the VMM.

    `status` is the completion code (RAX bits 63:32 shifted into place); `gpa` has its low
    12 bits cleared by the module and keeps the shared bit. `because` is no part of the exit: it
    says in words, with the rule's id, why there is one.
    """

    status: int
    reason: ExitReason
    qualification: int = 0
    extended_type: ExtendedQualification = ExtendedQualification.NONE
    extended_info: int = 0  # ACCEPT: bits 2:0 the level asked for (0: 4 KiB, 1: 2 MiB)
    gpa: int = 0
    interruption_info: int = 0
    because: str = ""


class Vmm(Protocol):
    """The host side of a TD exit."""

    def tdvmcall(self, registers: list[int]) -> None:
        """Serve a TDG.VP.VMCALL.

        `registers` holds 16 values in hardware order (`trapline.cpu.engine.Reg`). Only those
        the guest selected are filled in, the others are 0, RAX and RCX are the module's. The
        VMM writes its answer into the same list; the module copies back only what the guest
        selected. The list is reused for the next call and must not be kept. RIP is already
        behind the TDCALL.
        """

    def ept_violation(self, td_exit: TdExit) -> None:
        """Serve an EPT violation or misconfiguration that the module did not turn into #VE.

        The instruction has not executed and runs again when this returns: change the GPA
        through `TdxModule.sept`, or stop the engine.
        """

    def td_exit(self, td_exit: TdExit) -> None:
        """Serve any other TD exit: triple fault, machine check, fatal module states."""

    def interrupt_window(self) -> None:
        """Serve Exit.INTERRUPT_WINDOW."""

    def boundary(self) -> None:
        """Serve Exit.BOUNDARY: a boundary asked for, or a budget used up."""

    def breakpoint(self) -> None:
        """Serve Exit.BREAKPOINT."""

    def intercepted_exception(self) -> bool:
        """Serve Exit.EXCEPTION for a vector that the VMM put into `intercept_exceptions`.

        True means it was dealt with; False lets the module deliver it to the guest.
        """


class VirtualApic(Protocol):
    """The x2APIC registers that a TD reaches without an exit (virtual APIC page).

    TPR 0x808, PPR 0x80a, EOI 0x80b, ISR 0x810-0x817, TMR 0x818-0x81f, IRR 0x820-0x827 and
    SELF_IPI 0x83f; `index` is the MSR's index, values have 32 bits.
    """

    def read(self, index: int) -> int:
        """Answer RDMSR."""

    def write(self, index: int, value: int) -> bool:
        """Carry out WRMSR; False when the CPU would raise #GP(0) (read-only, reserved bits)."""


class VeInfo(NamedTuple):
    """VE_INFO, as TDG.VP.VEINFO.GET returns it.

    The instruction length is not meaningful for EPT violations (Linux: `ve_instr_len`).
    """

    reason: int
    qualification: int = 0
    gla: int = 0
    gpa: int = 0
    length: int = 0
    info: int = 0


class TrapListener(Protocol):
    """Told of each trap, before the guest or the VMM sees it. Calls must be cheap."""

    def on_ve(self, rip: int, info: VeInfo, *, double_fault: bool) -> None:
        """Note a #VE, or the #DF(0) delivered in its place because VE_INFO was still valid."""

    def on_tdcall(self, rip: int, leaf: int, status: int) -> None:
        """Note a TDCALL that completed with `status` in RAX; not a VP.VMCALL that succeeds."""

    def on_tdvmcall(self, rip: int, registers: list[int]) -> None:
        """Note a TDG.VP.VMCALL that the VMM will now serve; `registers` as in `Vmm.tdvmcall`."""


@dataclass(frozen=True, slots=True)
class TdConfig:
    """What the VMM fixes at TDH.MNG.INIT, and what the software TD needs beside it.

    The GPA width is the engine's (`Memory.shared_bit`).
    """

    memory_size: int  # bytes of RAM from GPA 0
    module_version: str = "1.5.01"
    attributes: int = 1 << 28  # SEPT_VE_DISABLE; bits as in rules/*/attributes.csv
    xfam: int = 0x3  # x87 and SSE: the engine has no AVX
    flexible_pending_ve: bool = True  # CONFIG_FLAGS bit 1
    no_rbp_mod: bool = False  # CONFIG_FLAGS bit 2
    tsc_frequency: int = 2_000_000_000  # Hz, a multiple of 25 MHz
    # CPUID bits that decide what MSRs do, beside those of ATTRIBUTES and XFAM. TSC deadline: MSR
    # 0x6e0 is #VE and not #GP.
    features: frozenset[Feature] = frozenset({Feature.TSC_DEADLINE})
    topology_configured: bool = True  # each VCPU got an x2APIC id of its own, as KVM does
    max_vcpus: int = 1
    mr_config_id: bytes = bytes(48)
    mr_owner: bytes = bytes(48)
    mr_owner_config: bytes = bytes(48)
