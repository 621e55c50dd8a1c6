"""RDMSR and WRMSR by the table `msrs`: native, answered by the module, #VE or #GP(0).

Every index of the table is resolved to a handler once, for the features this TD has. Native
MSRs that steer the CPU are left to the engine, which takes no exit for them; the others hold
a value here. The virtual APIC page is the VMM's (`VirtualApic`).

Sources: TDX module 1.5.01, td_msr_access.c, auto_gen/msr_config_lookup.c; SDM volume 3, 30.5
(virtualised x2APIC accesses), volume 4 (what the CPU checks).
"""

from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Final

from trapline.base.errors import BadInputFileError
from trapline.cpu.engine import Reg
from trapline.cpu.msrvalues import is_taken
from trapline.rules.rows import (
    CpuAccess,
    Feature,
    InstructionRule,
    MsrAction,
    MsrKind,
    MsrRule,
    MsrSpecial,
    Outcome,
)
from trapline.rules.ruleset import choose
from trapline.tdx.vmm_interface import ExitReason, TdConfig, VeInfo

if TYPE_CHECKING:
    from trapline.cpu.engine import Vcpu
    from trapline.rules.ruleset import RuleSet
    from trapline.tdx.ve_info import VeState
    from trapline.tdx.vmm_interface import VirtualApic

M32 = 0xFFFF_FFFF
Read = Callable[[], int | None]  # None: #GP(0)


class Written(Enum):
    """What became of a WRMSR."""

    DONE = auto()
    GP = auto()
    VE = auto()
    TAKEN = auto()  # RIP and events are already as they should be


Write = Callable[[int], Written]

# MSRs that decide what the CPU does; the engine holds them and knows what is canonical.
# SYSENTER_CS/ESP/EIP, PAT; EFER, STAR, LSTAR, FMASK; FS, GS and kernel GS base, TSC_AUX.
_SYSENTER_AND_PAT = (0x174, 0x175, 0x176, 0x277)
_SYSCALL = (0xC000_0080, 0xC000_0081, 0xC000_0082, 0xC000_0084)
_BASES = (0xC000_0100, 0xC000_0101, 0xC000_0102, 0xC000_0103)
ENGINE_MSRS: Final = frozenset((*_SYSENTER_AND_PAT, *_SYSCALL, *_BASES))
BITMAPS: Final = (range(0x2000), range(0xC000_0000, 0xC000_2000))
TSC: Final = 0x10
EFER, EFER_SCE, EFER_LMA = 0xC000_0080, 1 << 0, 1 << 10
XSS: Final = 0xDA0
XFAM_SUPERVISOR: Final = 0x1_FD00  # PT, PASID, CET_U, CET_S, HDC, UINTR, LBR, HWP
DEBUGCTL: Final = 0x1D9
DEBUGCTL_RESERVED: Final = ~0xFFC7 & (1 << 64) - 1
DEBUGCTL_FREEZE_SMM, DEBUGCTL_RTM = 1 << 14, 1 << 15
DEBUGCTL_TR, DEBUGCTL_BTS, DEBUGCTL_UNCORE_PMI = 1 << 6, 1 << 7, 1 << 13
X2APIC_SELF_IPI: Final = 0x83F
LOWEST_SELF_IPI: Final = 16
APIC_PAGE_SELF_IPI: Final = 0x3F0  # its offset in the APIC page
X2APIC_WRITABLE: Final = {0x808: 0xFF, 0x80B: 0, X2APIC_SELF_IPI: 0xFF}  # TPR, EOI

# Bits that the CPU accepts in native MSRs that are kept here; all 64 where not named.
_WRITABLE: Final = {
    0x48: 0x57F,  # SPEC_CTRL: IBRS, STIBP, SSBD, IPRED_DIS, RRSBA_DIS, PSFD, DDPD, BHI_DIS_S
    0x49: 0x1,  # PRED_CMD: IBPB
    0x10B: 0x1,  # FLUSH_CMD: L1D_FLUSH
    0x1B01: 0x1,  # UARCH_MISC_CTL: DOITM
}
_COMMANDS: Final = frozenset((0x49, 0x10B))  # nothing is stored

# What the module answers where the VMM asks for nothing, as KVM and QEMU do not: bits 4, 20 and
# 24 are 0 then; 10, 11, 17, 21 and those above 24 always (1.5.01, virt_msr_helpers.c).
# RDCL_NO IBRS_ALL SKIP_L1DFL_VMENTRY MDS_NO PSCHANGE_MC_NO TAA_NO DOITM SBDR_SSDP_NO FBSDP_NO
# PSDP_NO
ARCH_CAPABILITIES: Final = sum(1 << bit for bit in (0, 1, 3, 5, 6, 8, 12, 13, 14, 15))
MISC_ENABLE: Final = 0x1 | 1 << 11 | 1 << 12  # fast strings; no BTS, no PEBS
MISC_ENABLE_INDEX: Final = 0x1A0
MISC_ENABLE_READ_ONLY: Final = 1 << 7 | 1 << 11 | 1 << 12
MISC_ENABLE_RESERVED: Final = 0xFFFF_FFFF_FF3A_E776
MISC_ENABLE_EST, MISC_ENABLE_FSM = 1 << 16, 1 << 18
MISC_ENABLE_LIMIT_CPUID, MISC_ENABLE_XTPR = 1 << 22, 1 << 23
# Values the module computes for L2 VMM software; this TD has none, so only what is fixed.
_VMX: Final = {0x486: 0x8000_0021, 0x487: 0xFFFF_FFFF, 0x488: 0x2000, 0x489: 0x35_67FF}


class Msrs:
    """Handles Exit.RDMSR and Exit.WRMSR for one TD."""

    def __init__(
        self,
        vcpu: "Vcpu",
        ve: "VeState",
        rules: "RuleSet",
        config: TdConfig,
        apic: "VirtualApic",
        features: frozenset[Feature],
    ) -> None:
        self._vcpu = vcpu
        self._ve = ve
        self._apic = apic
        self._xss_allowed = config.xfam & XFAM_SUPERVISOR
        self._features = features
        self._self_ipi = self._low_self_ipi(rules)
        self.values: dict[int, int] = {}  # native and emulated MSRs that the engine lacks
        self._reads: dict[int, Read] = {}
        self._writes: dict[int, Write] = {}
        self._listed: set[int] = set()
        self._rows = tuple(rules.each(MsrRule))
        self._absent = rules.ask(MsrRule, MsrKind.ABSENT, None, None)
        self._outside = rules.ask(MsrRule, MsrKind.OUTSIDE, None, None)
        self._unlisted: dict[tuple[ExitReason, bool], bool] = {}
        self._add_rows()

    def set_features(self, features: frozenset[Feature]) -> None:
        """Resolve the rows anew for what is on."""
        if features != self._features:
            self._features = features
            self._add_rows()

    def _add_rows(self) -> None:
        self._reads.clear()
        self._writes.clear()
        for row in self._rows:
            if row.kind == MsrKind.RANGE:
                self._add(row)
        for inside, row in ((True, self._absent), (False, self._outside)):
            read = self._resolve(row.read, row.read_feature)
            write = self._resolve(row.write, row.write_feature)
            self._unlisted[ExitReason.RDMSR, inside] = _is_ve(row, read)
            self._unlisted[ExitReason.WRMSR, inside] = _is_ve(row, write)

    # Exits.

    def on_read(self) -> None:
        """RDMSR."""
        vcpu = self._vcpu
        regs = vcpu.regs
        index = regs[Reg.RCX] & M32
        read = self._reads.get(index)
        if read is None:
            self._without_handler(ExitReason.RDMSR, index)
            return
        value = read()
        if value is None:
            self._ve.general_protection()
            return
        regs[Reg.RAX] = value & M32
        regs[Reg.RDX] = value >> 32
        vcpu.advance(vcpu.length)

    def on_write(self) -> None:
        """WRMSR."""
        vcpu = self._vcpu
        regs = vcpu.regs
        index = regs[Reg.RCX] & M32
        write = self._writes.get(index)
        if write is None:
            self._without_handler(ExitReason.WRMSR, index)
            return
        written = write((regs[Reg.RDX] & M32) << 32 | regs[Reg.RAX] & M32)
        if written is Written.DONE:
            vcpu.advance(vcpu.length)
        elif written is Written.GP:
            self._ve.general_protection()
        elif written is Written.VE:
            self._ve.inject(VeInfo(ExitReason.WRMSR, length=vcpu.length))

    def _without_handler(self, reason: ExitReason, index: int) -> None:
        """#VE for a row that says so, else what the rule for MSRs that are not listed says."""
        inside = any(index in bitmap for bitmap in BITMAPS)
        if index in self._listed or self._unlisted[reason, inside]:
            self._ve.inject(VeInfo(reason, length=self._vcpu.length))
        else:
            self._ve.general_protection()

    # Building the handlers.

    def _add(self, row: MsrRule) -> None:
        assert row.first is not None
        assert row.last is not None
        read = self._resolve(row.read, row.read_feature)
        write = self._resolve(row.write, row.write_feature)
        for index in range(row.first, row.last + 1):
            self._listed.add(index)
            reader = self._reader(row, index, read)
            if reader is not None:
                self._reads[index] = reader
            writer = self._writer(row, index, write)
            if writer is not None:
                self._writes[index] = writer
            if index in ENGINE_MSRS:
                native = MsrAction.NATIVE
                self._vcpu.native_msr(index, read=read == native, write=write == native)

    def _resolve(self, action: MsrAction, feature: Feature) -> MsrAction:
        """Decide the action for the features that are on: native, emulated, gp or ve."""
        on = feature in self._features
        if action == MsrAction.NATIVE_UNLESS_GP:
            return MsrAction.NATIVE if on else MsrAction.GP
        if action == MsrAction.NATIVE_UNLESS_EMULATED:
            return MsrAction.NATIVE if on else MsrAction.EMULATED
        if action == MsrAction.GP_UNLESS_VE:
            return MsrAction.VE if on else MsrAction.GP
        if action == MsrAction.VE_UNLESS_GP:
            return MsrAction.GP if on else MsrAction.VE
        if action == MsrAction.VE_UNLESS_EMULATED:
            return MsrAction.EMULATED if on else MsrAction.VE
        return action

    def _reader(self, row: MsrRule, index: int, action: MsrAction) -> Read | None:
        if action == MsrAction.VE:
            return None
        if action == MsrAction.GP or row.cpu_access == CpuAccess.WRITE:
            return _nothing
        if index == TSC:
            return self._read_tsc
        if row.special == MsrSpecial.X2APIC:
            return partial(self._apic.read, index)
        if index in ENGINE_MSRS:
            return partial(self._vcpu.msr, index)
        if action == MsrAction.EMULATED:
            return partial(self.values.get, index, _answer(row.special, index))
        return partial(self.values.get, index, 0)

    def _writer(self, row: MsrRule, index: int, action: MsrAction) -> Write | None:
        if action == MsrAction.VE:
            return None
        if action == MsrAction.GP or row.cpu_access == CpuAccess.READ:
            return _refused
        checked: dict[MsrSpecial, Write] = {
            MsrSpecial.X2APIC: partial(self._write_x2apic, index),
            MsrSpecial.EFER: self._write_efer,
            MsrSpecial.XSS: self._write_xss,
            MsrSpecial.DEBUGCTL: self._write_debugctl,
            MsrSpecial.DEBUGCTL_BY_FEATURE: self._write_debugctl_by_feature,
            MsrSpecial.MISC_ENABLE: self._write_misc_enable,
            MsrSpecial.IGNORED: _ignored,
            MsrSpecial.MICROCODE: _ignored,
            MsrSpecial.ZERO: _only_zero,
        }
        if row.special in checked:
            return checked[row.special]
        if index in ENGINE_MSRS:
            return partial(self._write_engine, index)
        return partial(self._write_value, index, _WRITABLE.get(index, (1 << 64) - 1))

    def _low_self_ipi(self, rules: "RuleSet") -> Callable[[], Written]:
        """Return what a SELF_IPI with a vector below 16 does."""
        row = rules.ask(InstructionRule, "APIC write", "self_ipi_vector_below_16")

        def inject() -> Written:
            # An APIC-write exit is trap-like: the #VE comes after the instruction.
            length = self._vcpu.length
            self._vcpu.advance(length)
            self._ve.inject(VeInfo(row.exit_reason or 0, APIC_PAGE_SELF_IPI, length=length))
            return Written.TAKEN

        can: dict[Outcome, Callable[[], Written]] = {
            Outcome.VE: inject,
            Outcome.GP: lambda: Written.GP,
            Outcome.NATIVE: lambda: Written.DONE,
        }
        return choose(row, can)

    # The handlers.

    def _read_tsc(self) -> int:
        return self._vcpu.cycles

    def _write_engine(self, index: int, value: int) -> Written:
        if not is_taken(index, value):
            return Written.GP
        self._vcpu.set_msr(index, value)
        return Written.DONE

    def _write_value(self, index: int, writable: int, value: int) -> Written:
        if value & ~writable or not is_taken(index, value):
            return Written.GP
        if index not in _COMMANDS:
            self.values[index] = value
        return Written.DONE

    def _write_efer(self, value: int) -> Written:
        """Only SCE may change; LMA is read-only and ignored."""
        old = self._vcpu.msr(EFER)
        value = value & ~EFER_LMA | old & EFER_LMA
        if (value ^ old) & ~EFER_SCE:
            return Written.VE
        self._vcpu.set_msr(EFER, value)
        return Written.DONE

    def _write_xss(self, value: int) -> Written:
        if value & ~self._xss_allowed:
            return Written.GP
        self.values[XSS] = value
        return Written.DONE

    def _write_debugctl(self, value: int) -> Written:
        if value & DEBUGCTL_RESERVED:
            return Written.GP
        if value & DEBUGCTL_TR and not value & DEBUGCTL_BTS:
            return Written.VE
        self.values[DEBUGCTL] = value & ~DEBUGCTL_UNCORE_PMI
        return Written.DONE

    def _write_debugctl_by_feature(self, value: int) -> Written:
        """Refuse what freezes or traces with features that the TD has not."""
        for bit, feature in ((DEBUGCTL_FREEZE_SMM, Feature.PERFMON), (DEBUGCTL_RTM, Feature.TSX)):
            if value & bit and feature not in self._features:
                return Written.GP
        return self._write_debugctl(value)

    def _write_misc_enable(self, value: int) -> Written:
        """Keep what the module lets the guest change (1.5.28, wrmsr_ia32_misc_enable())."""
        old = self.values.get(MISC_ENABLE_INDEX, MISC_ENABLE)
        value = value & ~MISC_ENABLE_READ_ONLY | old & MISC_ENABLE_READ_ONLY
        if value & MISC_ENABLE_RESERVED:
            return Written.GP
        if value & MISC_ENABLE_EST and Feature.EST not in self._features:
            return Written.GP
        if (value ^ old) & MISC_ENABLE_FSM or value & MISC_ENABLE_LIMIT_CPUID:
            return Written.VE
        if value & MISC_ENABLE_XTPR:
            return Written.GP
        self.values[MISC_ENABLE_INDEX] = value
        return Written.DONE

    def _write_x2apic(self, index: int, value: int) -> Written:
        """Write what the virtual APIC page takes; all else is read-only or reserved."""
        if index == X2APIC_SELF_IPI and value < LOWEST_SELF_IPI:
            return self._self_ipi()
        if value & ~X2APIC_WRITABLE.get(index, 0) or index not in X2APIC_WRITABLE:
            return Written.GP
        return Written.DONE if self._apic.write(index, value) else Written.GP


def _is_ve(row: MsrRule, action: MsrAction) -> bool:
    """Say whether an MSR that is not listed is #VE, and not #GP(0)."""
    if action in {MsrAction.VE, MsrAction.GP}:
        return action == MsrAction.VE
    raise BadInputFileError(
        f"msrs.csv: {row.id} says {action.value!r}, which the software TD cannot do; say 've' or "
        "'gp'."
    )


def _answer(special: MsrSpecial, index: int) -> int:
    """Return what the module answers before the guest writes anything."""
    return {
        MsrSpecial.ARCH_CAPABILITIES: ARCH_CAPABILITIES,
        MsrSpecial.XAPIC_DISABLE_STATUS: 1,
        MsrSpecial.MISC_ENABLE: MISC_ENABLE,
        MsrSpecial.VMX: _VMX.get(index, 0),
        MsrSpecial.LOCKED: 1,
        MsrSpecial.MICROCODE: M32,
    }.get(special, 0)


def _nothing() -> None:
    """Answer the RDMSR that is #GP(0)."""


def _refused(value: int) -> Written:
    del value
    return Written.GP


def _ignored(value: int) -> Written:
    del value
    return Written.DONE


def _only_zero(value: int) -> Written:
    return Written.GP if value else Written.DONE
