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

    @property
    def needs_feature(self) -> bool:
        """Whether the row must name the feature that decides."""
        return "unless" in self.value


class MsrFeature(StrEnum):
    """What the VMM may have switched on for the TD."""

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
    DCA = "dca"
    TME = "tme"
    TSC_DEADLINE = "tsc_deadline"


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


class CpuAccess(StrEnum):
    """What the CPU itself allows of a native MSR."""

    BOTH = "both"
    READ = "read"
    WRITE = "write"


class MsrKind(StrEnum):
    """Whether a row is for a range of indices or for all others."""

    RANGE = "range"
    ABSENT = "absent"


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


class Modelled(StrEnum):
    """How much of a TDCALL leaf the software TD has."""

    YES = "yes"
    PARTLY = "partly"
    NO = "no"


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
    followed: bool
    note: str = field(default="")

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
    read_feature: MsrFeature
    write: MsrAction
    write_feature: MsrFeature
    cpu_access: CpuAccess
    special: MsrSpecial


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuidRule(Rule):
    """Who answers CPUID for leaves `first` to `last`; no sub-leaf means any.

    `index` is the leaf's place in the module's own table, and in the field CPUID_CONTROL.
    """

    KEY: ClassVar[tuple[str, ...]] = ("kind", "first", "last", "subleaf")
    ANSWER: ClassVar[tuple[str, ...]] = ("outcome",)

    kind: CpuidKind
    name: str
    first: int | None
    last: int | None
    subleaf: int | None
    index: int | None
    outcome: CpuidOutcome
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
    modelled: Modelled


@dataclass(frozen=True, slots=True, kw_only=True)
class TdvmcallRule(Rule):
    """Registers of a TDVMCALL function, by GHCI; `kvm` tells whether KVM answers it."""

    KEY: ClassVar[tuple[str, ...]] = ("function",)
    ANSWER: ClassVar[tuple[str, ...]] = ("inputs", "outputs")

    function: int
    name: str
    inputs: str
    outputs: str
    kvm: bool


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
    """A bit of ATTRIBUTES, CONFIG_FLAGS, TD_CTLS, NOTIFY_ENABLES or XFAM."""

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
