"""CPUID: which leaves the module answers, and the processor it shows.

The table `cpuid` decides between an answer and #VE. The answers describe a Sapphire Rapids
core as a TD sees it, less what the engine cannot execute (`Vcpu.cpuid_features`), so that a
run does not depend on the machine it runs on. Where the module fixes a bit, it has the
module's value even if nothing is behind it here (PDCM, DS, x2APIC, MTRR …).

Sources: TDX module 1.5.01, td_cpuid.c, auto_gen/cpuid_configurations.c; fixed bits as observed
in TDs by intel/lkvs, BM/tdx-compliance/tdx-compliance-cpuid.h.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from trapline.cpu.engine import Reg
from trapline.rules.rows import CpuidKind, CpuidOutcome, CpuidRule, Feature
from trapline.tdx.vmm_interface import ExitReason, TdConfig, VeInfo

if TYPE_CHECKING:
    from trapline.cpu.engine import Vcpu
    from trapline.rules.ruleset import RuleSet
    from trapline.tdx.ve_info import VeState

M32: Final = 0xFFFF_FFFF
EXTENDED_START: Final = 0x8000_0000
EXTENDED_LAST: Final = 0x8000_0008
HOST_LEAVES: Final = range(0x4000_0000, 0x5000_0000)
CRYSTAL_HZ: Final = 25_000_000
LINEAR_BITS: Final = 48
_WIDE: Final = 0xFFFF  # leaves: a row for more is not spelled out

CR4_OSXSAVE, CR4_PKE = 1 << 18, 1 << 22
ECX1_OSXSAVE: Final = 1 << 27
ECX7_OSPKE: Final = 1 << 4
EFER, EFER_LMA = 0xC000_0080, 1 << 10
EDX_SYSCALL: Final = 1 << 11
CS_LONG: Final = 1 << 21
GUEST_ASKED_SUPERVISOR, GUEST_ASKED_USER = 1, 2  # CPUID_CONTROL of a leaf


class Answer(NamedTuple):
    """EAX, EBX, ECX, EDX."""

    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


# What stands whatever the engine can execute: fixed by the module, or no instruction at all.
# Leaf 1 ECX: DTES64 DS-CPL PDCM x2APIC TSC-deadline RDRAND HYPERVISOR.
_ALWAYS: Final = {
    (1, 0, "ecx"): 1 << 2 | 1 << 4 | 1 << 15 | 1 << 21 | 1 << 24 | 1 << 30 | 1 << 31,
    (1, 0, "edx"): 0x0FA9_FBFF,
    # FDP_EXCPTN_ONLY, FCS/FDS deprecation, RDSEED.
    (7, 0, "ebx"): 1 << 6 | 1 << 13 | 1 << 18,
    # BUS_LOCK_DETECT.
    (7, 0, "ecx"): 1 << 24,
    # FSRM MD_CLEAR IBRS STIBP L1D_FLUSH ARCH_CAPABILITIES CORE_CAPABILITIES SSBD.
    (7, 0, "edx"): 1 << 4 | 1 << 10 | 0x3F << 26,
    # PSFD IPRED_CTRL RRSBA_CTRL BHI_CTRL.
    (7, 2, "edx"): 0x17,
    (0x8000_0001, 0, "edx"): 1 << 11 | 1 << 20 | 1 << 27 | 1 << 29,
}

# The processor, before what the engine lacks is taken away. (leaf, sub-leaf) -> registers.
_PROCESSOR: Final = {
    (0x0, 0): Answer(0x23, 0x756E_6547, 0x6C65_746E, 0x4965_6E69),
    # Family 6, model 0x8f, stepping 8; CLFLUSH of 64 bytes, one logical processor.
    (0x1, 0): Answer(0x000806F8, 0x0001_0800, 0xC7FA_A217, 0x0FA9_FBFF),
    (0x4, 0): Answer(0x0000_0121, 0x02C0_003F, 0x3F),  # L1D: 48 KiB, 12 ways
    (0x4, 1): Answer(0x0000_0122, 0x01C0_003F, 0x3F),  # L1I: 32 KiB, 8 ways
    (0x4, 2): Answer(0x0000_0143, 0x03C0_003F, 0x7FF),  # L2: 2 MiB, 16 ways
    (0x4, 3): Answer(0x0000_0163, 0x03C0_003F, 0x7FFF),  # L3: 32 MiB, 16 ways
    (0x5, 0): Answer(0x40, 0x40, 0x3),
    # FSGSBASE … as fixed or allowed; no AVX state in XFAM.
    (0x7, 0): Answer(2, 0x219C_27C9, 0x1940_0004, 0xFC00_0410),
    (0x7, 2): Answer(0, 0, 0, 0x17),
    (0xD, 0): Answer(0x3, 576, 576),
    (0xD, 1): Answer(0xF, 576),
    (0x21, 0): Answer(0, 0x6574_6E49, 0x2020_2020, 0x5844_546C),  # "IntelTDX    "
    (0x8000_0000, 0): Answer(EXTENDED_LAST),
    (0x8000_0001, 0): Answer(0, 0, 0x121, 0x2C10_0800),
    (0x8000_0007, 0): Answer(0, 0, 0, 0x100),
}
# What newer modules answer where #VE is reduced (1.5.34, auto_gen_1_5/cpuid_configurations.c). The
# topology is what KVM's user space gives a TD with one VCPU: thread 0 of core 0, x2APIC id 0.
X2APIC_ID: Final = 0
TOPOLOGY_LEAVES: Final = frozenset((0xB, 0x1F))
_THREAD, _CORE = Answer(0, 1, 0x100, X2APIC_ID), Answer(0, 1, 0x201, X2APIC_ID)
_NEWER: Final = {
    (0x2, 0): Answer(0x00FE_FF01),
    (0x6, 0): Answer(0x4),  # ARAT
    **{(leaf, 0): _THREAD for leaf in TOPOLOGY_LEAVES},
    **{(leaf, 1): _CORE for leaf in TOPOLOGY_LEAVES},
    **{(0x1F, level): Answer(ecx=level) for level in range(2, 6)},
    (0xB, 2): Answer(ecx=2),
    (0x8000_0002, 0): Answer(0x6574_6E49, 0x4454_206C, 0x2020_2058),  # "Intel TDX   "
    (0x8000_0006, 0): Answer(ecx=0x7040),
}
# Feature -> where CPUID shows it: leaf, sub-leaf, register, mask.
_FLAGS: Final = (
    (Feature.DCA, 1, "ecx", 1 << 18),
    (Feature.TSC_DEADLINE, 1, "ecx", 1 << 24),
    (Feature.EST, 1, "ecx", 1 << 7),
    (Feature.TM2, 1, "ecx", 1 << 8),
    (Feature.MCA, 1, "edx", 1 << 7 | 1 << 14),
    (Feature.MTRR, 1, "edx", 1 << 12),
    (Feature.ACPI, 1, "edx", 1 << 22),
    (Feature.RDT_M, 7, "ebx", 1 << 12),
    (Feature.RDT_A, 7, "ebx", 1 << 15),
    (Feature.TME, 7, "ecx", 1 << 13),
    (Feature.MKTME, 7, "edx", 1 << 18),
    (Feature.CORE_CAPABILITIES, 7, "edx", 1 << 30),
)
_FEATURE_LEAVES: Final = frozenset(((1, 0), (7, 0), (7, 1), (7, 2), (0xD, 1), (0x8000_0001, 0)))
# Registers of those leaves that hold no features: family, CLFLUSH size, counts and sizes.
_NO_FEATURES: Final = frozenset(
    ((1, 0, "eax"), (1, 0, "ebx"), (7, 0, "eax"), (7, 1, "eax"), (0xD, 1, "ebx"))
)


class _Leaf(NamedTuple):
    """A row, resolved: its place in CPUID_CONTROL, and whether the module answers."""

    place: int | None
    answered: bool


_NO_LEAF: Final = _Leaf(None, answered=False)


class Cpuid:
    """Handles Exit.CPUID. `supervisor_ve` and `user_ve` are set by TDG.VP.CPUIDVE.SET."""

    def __init__(
        self,
        vcpu: "Vcpu",
        ve: "VeState",
        rules: "RuleSet",
        config: TdConfig,
        features: frozenset[Feature],
    ) -> None:
        self._vcpu = vcpu
        self._ve = ve
        self.supervisor_ve = False
        self.user_ve = False
        self.control: dict[int, int] = {}  # CPUID_CONTROL, by index
        self._processor = processor(config, vcpu.memory.shared_bit)
        self._rows = tuple(rules.each(CpuidRule))
        clamp = rules.ask(CpuidRule, CpuidKind.CLAMP, *_clamp_key(self._rows))
        self._clamps = clamp.outcome == CpuidOutcome.MODULE
        self._last_leaf = clamp.first or 0
        self._absent = rules.ask(CpuidRule, CpuidKind.ABSENT, None, None, None)
        asked = rules.ask(CpuidRule, CpuidKind.GUEST_ASKED, None, None, None)
        self._asked_is_ve = asked.outcome == CpuidOutcome.VE
        self._features: frozenset[Feature] | None = None
        self._host_leaf = _NO_LEAF
        self._any: dict[int, _Leaf] = {}  # rows that hold for every sub-leaf
        self._one: dict[tuple[int, int], _Leaf] = {}
        self.set_features(features)

    def set_features(self, features: frozenset[Feature]) -> None:
        """Resolve the rows anew for what is on, if that is news: each restore comes here."""
        if features == self._features:
            return
        self._features = features
        self._shown = shown_for(self._processor, features)
        self._absent_is_ve = not _is_answered(self._absent, features)
        self._any.clear()
        self._one.clear()
        for row in self._rows:
            if row.kind != CpuidKind.LEAF:
                continue
            assert row.first is not None
            assert row.last is not None
            leaf = _Leaf(row.index, _is_answered(row, features))
            if row.last - row.first > _WIDE:
                assert row.first == HOST_LEAVES.start, "no other range is wide"
                self._host_leaf = leaf
                continue
            for number in range(row.first, row.last + 1):
                if row.subleaf is None:
                    self._any[number] = leaf
                else:
                    self._one[number, row.subleaf] = leaf

    def on_cpuid(self) -> None:
        """Answer, or #VE."""
        vcpu = self._vcpu
        regs = vcpu.regs
        answer = self.answer(regs[Reg.RAX] & M32, regs[Reg.RCX] & M32, vcpu.cpl)
        if answer is None:
            self._ve.inject(VeInfo(ExitReason.CPUID, length=vcpu.length))
            return
        regs[Reg.RAX], regs[Reg.RBX], regs[Reg.RCX], regs[Reg.RDX] = answer
        vcpu.advance(vcpu.length)

    def answer(self, leaf: int, subleaf: int, cpl: int = 0) -> Answer | None:
        """Return what the module answers, or None for #VE."""
        if leaf in HOST_LEAVES:
            return Answer() if self._host_leaf.answered else None
        if leaf > EXTENDED_LAST or self._last_leaf < leaf < EXTENDED_START:
            if not self._clamps:
                return None
            leaf = self._last_leaf
        row = self._any.get(leaf)
        if row is not None:
            subleaf = 0
        else:
            row = self._one.get((leaf, subleaf))
        if row is None:
            return self._of_absent(leaf, subleaf, cpl)
        if not row.answered or (self._asked_is_ve and self._guest_asked(row, cpl)):
            return None
        answer = self._shown.get((leaf, subleaf), Answer())
        if (leaf, subleaf) in _FEATURE_LEAVES:
            answer = executable(leaf, subleaf, answer, self._vcpu.cpuid_features)
        return self._dynamic(leaf, subleaf, answer)

    def _of_absent(self, leaf: int, subleaf: int, cpl: int) -> Answer | None:
        """Answer for what is not in the table, where the rules do not say #VE."""
        if self._absent_is_ve or (self._asked_is_ve and self._guest_asked(_NO_LEAF, cpl)):
            return None
        if leaf in TOPOLOGY_LEAVES:
            return Answer(ecx=subleaf & 0xFF, edx=X2APIC_ID)
        return Answer()

    def _guest_asked(self, row: _Leaf, cpl: int) -> bool:
        control = self.control.get(row.place, 0) if row.place is not None else 0
        if cpl:
            return self.user_ve or bool(control & GUEST_ASKED_USER)
        return self.supervisor_ve or bool(control & GUEST_ASKED_SUPERVISOR)

    def _dynamic(self, leaf: int, subleaf: int, answer: Answer) -> Answer:
        """Fill in the bits that follow the state of the VCPU."""
        vcpu = self._vcpu
        if leaf == 1 and vcpu.cr(4) & CR4_OSXSAVE:
            return answer._replace(ecx=answer.ecx | ECX1_OSXSAVE)
        if (leaf, subleaf) == (7, 0) and vcpu.cr(4) & CR4_PKE:
            return answer._replace(ecx=answer.ecx | ECX7_OSPKE)
        if leaf == 0x8000_0001 and not (
            vcpu.msr(EFER) & EFER_LMA and vcpu.segment("cs").attributes & CS_LONG
        ):
            return answer._replace(edx=answer.edx & ~EDX_SYSCALL)
        return answer


def _clamp_key(rows: tuple[CpuidRule, ...]) -> tuple[object, ...]:
    """Return the rest of the key of the row for leaves above the maximum."""
    return next((row.key[1:] for row in rows if row.kind == CpuidKind.CLAMP), (None, None, None))


def _is_answered(row: CpuidRule, features: frozenset[Feature]) -> bool:
    if row.outcome == CpuidOutcome.MODULE:
        return True
    return row.control in features and row.feature not in features


def processor(config: TdConfig, shared_bit: int) -> dict[tuple[int, int], Answer]:
    """Describe the processor for this TD, before what the engine cannot execute is left out."""
    shown = {**_PROCESSOR, **_NEWER}
    shown[0x15, 0] = Answer(1, config.tsc_frequency // CRYSTAL_HZ, CRYSTAL_HZ)
    shown[0x8000_0008, 0] = Answer(shared_bit.bit_length() | LINEAR_BITS << 8)
    return shown


def shown_for(
    processor_: dict[tuple[int, int], Answer], features: frozenset[Feature]
) -> dict[tuple[int, int], Answer]:
    """Leave out the bits of features that are not on."""
    shown = dict(processor_)
    for feature, leaf, register, mask in _FLAGS:
        if feature not in features:
            answer = shown[leaf, 0]
            shown[leaf, 0] = answer._replace(**{register: getattr(answer, register) & ~mask})
    return shown


def executable(
    leaf: int, subleaf: int, answer: Answer, features: Mapping[tuple[int, int, str], int]
) -> Answer:
    """Leave out the feature bits that the engine cannot execute in its present state."""
    registers = {}
    for name, value in answer._asdict().items():
        key = leaf, subleaf, name
        if key in _NO_FEATURES:
            registers[name] = value
        else:
            registers[name] = value & (features.get(key, 0) | _ALWAYS.get(key, 0))
    return Answer(**registers)
