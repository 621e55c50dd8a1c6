"""The row types of the rule tables, and the words that may stand in their columns.

Each field of a row class is a column; its type says what may stand in it. `KEY` names the
columns that make up the question a row answers: followed rows of one table never share a key.
`ANSWER` names those in which two answers to a question may disagree.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar


class Claimant(StrEnum):
    """Who says what a row says."""

    MODULE = "module"
    MODULE_COMMENT = "module-comment"
    SDM = "sdm"
    GHCI = "ghci"
    LINUX_CODE = "linux-code"
    LINUX_DOC = "linux-doc"
    INTEL_GUIDE = "intel-guide"
    LKVS = "lkvs"
    SDV = "sdv"
    MAIL = "mail"


class Standing(StrEnum):
    """What a row is to the software TD."""

    ENFORCED = "enforced"  # the answer is taken from this row: another one, another TD
    DESCRIBED = "described"  # true and sourced, and nothing here asks it
    CLAIMED = "claimed"  # what somebody else says
    REMOVED = "removed"  # a row of the version that this one is compared with, and no longer here


class Outcome(StrEnum):
    """What becomes of an instruction, an access or an event."""

    NATIVE = "native"
    EMULATED = "emulated"
    VE = "ve"
    GP = "gp"
    UD = "ud"
    PF = "pf"
    DF = "df"
    TRIPLE_FAULT = "triple_fault"
    TD_EXIT = "td_exit"
    TD_FATAL = "td_fatal"
    MODULE_FATAL = "module_fatal"
    SEE_CPUID = "see_cpuid"
    SEE_MSRS = "see_msrs"
    SEE_TDCALLS = "see_tdcalls"
    HELD = "held"
    DELIVERED = "delivered"
    MERGED = "merged"
    REPLACES = "replaces"
    COMBINED = "combined"
    NOT_INJECTED = "not_injected"
    REBLOCKED = "reblocked"
    RF_SET = "rf_set"
    RF_KEPT = "rf_kept"
    SHADOW_LOST = "shadow_lost"
    LOOP = "loop"


class MsrAction(StrEnum):
    """What RDMSR or WRMSR of an index does; see README.md."""

    NATIVE = "native"
    VE = "ve"
    GP = "gp"
    EMULATED = "emulated"
    NATIVE_UNLESS_GP = "native_unless_gp"
    NATIVE_UNLESS_EMULATED = "native_unless_emulated"
    GP_UNLESS_VE = "gp_unless_ve"
    VE_UNLESS_GP = "ve_unless_gp"
    VE_UNLESS_EMULATED = "ve_unless_emulated"

    @property
    def needs_feature(self) -> bool:
        """Whether the row must name the feature that decides."""
        return "unless" in self.value


class Feature(StrEnum):
    """What the VMM may have switched on for the TD, or the TD for itself."""

    NONE = ""
    PERFMON = "perfmon"
    PERFMON_AND_PT = "perfmon_and_pt"
    PERF_METRICS = "perf_metrics"
    PKS = "pks"
    TSX = "tsx"
    UMWAIT = "umwait"
    XFD = "xfd"
    CET = "cet"
    LBR = "lbr"
    PT = "pt"
    UINTR = "uintr"
    MKTME = "mktme"
    # CPUID flags; from 1.5.28 on the guest may ask for them (FEATURE_PARAVIRT_CTLS).
    DCA = "dca"
    TME = "tme"
    TSC_DEADLINE = "tsc_deadline"
    EST = "est"
    TM2 = "tm2"
    MTRR = "mtrr"
    MCA = "mca"
    ACPI = "acpi"
    RDT_M = "rdt_m"
    RDT_A = "rdt_a"
    CORE_CAPABILITIES = "core_capabilities"
    # TD_CTLS.
    ENUM_TOPOLOGY = "enum_topology"
    VIRT_CPUID2 = "virt_cpuid2"
    REDUCE_VE = "reduce_ve"


class MsrSpecial(StrEnum):
    """Extra checks and answers that no column expresses."""

    NONE = ""
    EFER = "efer"
    XSS = "xss"
    DEBUGCTL = "debugctl"
    MISC_ENABLE = "misc_enable"
    PERF_CAPABILITIES = "perf_capabilities"
    ARCH_CAPABILITIES = "arch_capabilities"
    XAPIC_DISABLE_STATUS = "xapic_disable_status"
    VMX = "vmx"
    X2APIC = "x2apic"
    X2APIC_ID = "x2apic_id"
    DEBUGCTL_BY_FEATURE = "debugctl_by_feature"
    IGNORED = "ignored"
    LOCKED = "locked"
    MICROCODE = "microcode"
    ZERO = "zero"


class CpuAccess(StrEnum):
    """What the CPU itself allows of a native MSR."""

    BOTH = "both"
    READ = "read"
    WRITE = "write"


class MsrKind(StrEnum):
    """Whether a row is for a range of indices or for others: in the MSR bitmaps, or outside."""

    RANGE = "range"
    ABSENT = "absent"
    OUTSIDE = "outside"


class CpuidKind(StrEnum):
    """Whether a row is for leaves, or for a rule about leaves."""

    LEAF = "leaf"
    ABSENT = "absent"
    CLAMP = "clamp"
    GUEST_ASKED = "guest_asked"


class CpuidOutcome(StrEnum):
    """Who answers CPUID."""

    MODULE = "module"
    VE = "ve"


class LinuxAction(StrEnum):
    """What becomes of an instruction whose #VE Linux handles."""

    ASKS_HOST = "asks_host"  # by a TDVMCALL
    ZEROS = "zeros"
    REFUSES = "refuses"


class StatusKind(StrEnum):
    """Which register a status or operand number is for."""

    COMPLETION = "completion"  # RAX of TDCALL and of TDH.VP.ENTER
    OPERAND = "operand"  # bits 31:0 of some completion codes
    GHCI = "ghci"  # R10 of TDVMCALL


class AttributeKind(StrEnum):
    """The register or field that a bit belongs to."""

    ATTRIBUTE = "attribute"
    CONFIG_FLAG = "config_flag"
    TD_CTL = "td_ctl"
    NOTIFY_ENABLE = "notify_enable"
    XFAM = "xfam"
    FEATURE_PARAVIRT_CTL = "feature_paravirt_ctl"  # of FEATURE_PARAVIRT_CTLS
    CALL_INFO = "call_info"  # R11 of GetTdVmCallInfo with R12 = 1


class FieldScope(StrEnum):
    """The TDCALL leaves that reach a metadata field: VM.RD, VP.RD or SYS.RD."""

    TD = "td"
    VP = "vp"
    SYS = "sys"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The columns every table has."""

    KEY: ClassVar[tuple[str, ...]] = ()
    ANSWER: ClassVar[tuple[str, ...]] = ()

    id: str
    module: str
    claimant: Claimant
    source: str
    standing: Standing
    note: str = field(default="")

    @property
    def followed(self) -> bool:
        """Whether this is the answer to its question that is held for true."""
        return self.standing in {Standing.ENFORCED, Standing.DESCRIBED}

    @property
    def key(self) -> tuple[object, ...]:
        """The question that the row answers."""
        return tuple(getattr(self, name) for name in self.KEY)

    @property
    def answer(self) -> tuple[object, ...]:
        """What the row answers, without what only some sources say beside it."""
        return tuple(getattr(self, name) for name in self.ANSWER)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionRule(Rule):
    """What an instruction or event does in a TD; `exit_reason` is that of the VM exit."""

    KEY: ClassVar[tuple[str, ...]] = ("mnemonic", "condition")
    ANSWER: ClassVar[tuple[str, ...]] = ("outcome",)

    mnemonic: str
    condition: str
    outcome: Outcome
    exit_reason: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MsrRule(Rule):
    """What RDMSR and WRMSR do for the indices `first` to `last`."""

    KEY: ClassVar[tuple[str, ...]] = ("kind", "first", "last")
    ANSWER: ClassVar[tuple[str, ...]] = ("read", "write")

    kind: MsrKind
    name: str
    first: int | None
    last: int | None
    read: MsrAction
    read_feature: Feature
    write: MsrAction
    write_feature: Feature
    cpu_access: CpuAccess
    special: MsrSpecial


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuidRule(Rule):
    """Who answers CPUID for leaves `first` to `last`; no sub-leaf means any.

    `index` is the leaf's place in the module's own table, and in the field CPUID_CONTROL. A row
    that says #VE is answered by the module when `control` is on and `feature`, if it names one,
    is off.
    """

    KEY: ClassVar[tuple[str, ...]] = ("kind", "first", "last", "subleaf")
    ANSWER: ClassVar[tuple[str, ...]] = ("outcome", "control", "feature")

    kind: CpuidKind
    name: str
    first: int | None
    last: int | None
    subleaf: int | None
    index: int | None
    outcome: CpuidOutcome
    control: Feature
    feature: Feature
    configurable: bool
    dynamic: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRule(Rule):
    """What an access to a page in some state does."""

    KEY: ClassVar[tuple[str, ...]] = ("access", "half", "state", "condition")
    ANSWER: ClassVar[tuple[str, ...]] = ("outcome",)

    access: str
    half: str
    state: str
    condition: str
    outcome: Outcome
    exit_reason: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinuxRule(Rule):
    """What Linux does with a #VE; no exit reason means any other."""

    KEY: ClassVar[tuple[str, ...]] = ("exit_reason", "condition")
    ANSWER: ClassVar[tuple[str, ...]] = ("does",)

    exit_reason: int | None
    condition: str
    does: LinuxAction
    since: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TdcallRule(Rule):
    """What a TDCALL leaf answers in one case; no leaf means any.

    `status` is a completion code of the table statuses, or `gp` or `td_exit`; `operand` is the
    operand number that is added to it.
    """

    KEY: ClassVar[tuple[str, ...]] = ("leaf", "case")
    ANSWER: ClassVar[tuple[str, ...]] = ("status", "operand")

    leaf: int | None
    name: str
    case: str
    status: str
    operand: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TdvmcallRule(Rule):
    """What the VMM answers a TDVMCALL function in one case; no function means any other.

    `status` is a status of the kind `ghci` of the table statuses. Registers are GHCI's.
    """

    KEY: ClassVar[tuple[str, ...]] = ("function", "case")
    ANSWER: ClassVar[tuple[str, ...]] = ("status",)

    function: int | None
    name: str
    case: str
    status: str
    inputs: str
    outputs: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusRule(Rule):
    """The value of a completion code, operand number or TDVMCALL status."""

    KEY: ClassVar[tuple[str, ...]] = ("kind", "name")
    ANSWER: ClassVar[tuple[str, ...]] = ("value",)

    kind: StatusKind
    name: str
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NestingRule(Rule):
    """What happens when events meet: a second #VE, an NMI, an IRET."""

    KEY: ClassVar[tuple[str, ...]] = ("question", "condition")
    ANSWER: ClassVar[tuple[str, ...]] = ("outcome",)

    question: str
    condition: str
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributeRule(Rule):
    """A bit of ATTRIBUTES, CONFIG_FLAGS, TD_CTLS, NOTIFY_ENABLES, XFAM or GetTdVmCallInfo."""

    KEY: ClassVar[tuple[str, ...]] = ("kind", "name")
    ANSWER: ClassVar[tuple[str, ...]] = ("bit",)

    kind: AttributeKind
    name: str
    bit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldRule(Rule):
    """A metadata field and what the guest may read and write of it.

    `code` is the whole 64-bit field identifier of the first of `elements` elements.
    """

    KEY: ClassVar[tuple[str, ...]] = ("scope", "code")
    ANSWER: ClassVar[tuple[str, ...]] = ("read_mask", "write_mask")

    scope: FieldScope
    name: str
    code: int
    elements: int
    read_mask: int
    write_mask: int
