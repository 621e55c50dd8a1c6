"""Numbers of the Guest-Hypervisor Communication Interface 1.5."""

from enum import IntEnum
from typing import Final


class TdVmCall(IntEnum):
    """Sub-functions in R11 of TDG.VP.VMCALL while R10 is 0 (GHCI 1.5, table 3-1)."""

    CPUID = 10
    HLT = 12
    IO = 30
    RDMSR = 31
    WRMSR = 32
    REQUEST_MMIO = 48
    WBINVD = 54
    PCONFIG = 65
    GET_TD_VM_CALL_INFO = 0x10000
    MAP_GPA = 0x10001
    GET_QUOTE = 0x10002
    REPORT_FATAL_ERROR = 0x10003
    SETUP_EVENT_NOTIFY_INTERRUPT = 0x10004
    SERVICE = 0x10005
    MIG_TD = 0x10006


class Status(IntEnum):
    """Completion status in R10."""

    SUCCESS = 0
    RETRY = 1
    INVALID_OPERAND = 0x8000_0000_0000_0000
    GPA_IN_USE = 0x8000_0000_0000_0001
    ALIGN_ERROR = 0x8000_0000_0000_0002
    SUBFUNC_UNSUPPORTED = 0x8000_0000_0000_0003


class QuoteStatus(IntEnum):
    """Status field of the GetQuote buffer (GHCI 1.5, table 3-11)."""

    SUCCESS = 0
    IN_FLIGHT = 0xFFFF_FFFF_FFFF_FFFF
    ERROR = 0x8000_0000_0000_0000
    SERVICE_UNAVAILABLE = 0x8000_0000_0000_0001


PAGE: Final = 4096
GPA_VALID: Final = 1 << 63  # R12 of ReportFatalError: R13 is the GPA of a page with more


def call_name(leaf: int) -> str:
    """Return the GHCI's name of a leaf, or its number."""
    try:
        return _NAMES[TdVmCall(leaf)]
    except ValueError:
        return f"{leaf:#x}"


_NAMES: Final = {
    TdVmCall.CPUID: "Instruction.CPUID",
    TdVmCall.HLT: "Instruction.HLT",
    TdVmCall.IO: "Instruction.IO",
    TdVmCall.RDMSR: "Instruction.RDMSR",
    TdVmCall.WRMSR: "Instruction.WRMSR",
    TdVmCall.REQUEST_MMIO: "#VE.RequestMMIO",
    TdVmCall.WBINVD: "Instruction.WBINVD",
    TdVmCall.PCONFIG: "Instruction.PCONFIG",
    TdVmCall.GET_TD_VM_CALL_INFO: "GetTdVmCallInfo",
    TdVmCall.MAP_GPA: "MapGPA",
    TdVmCall.GET_QUOTE: "GetQuote",
    TdVmCall.REPORT_FATAL_ERROR: "ReportFatalError",
    TdVmCall.SETUP_EVENT_NOTIFY_INTERRUPT: "SetupEventNotifyInterrupt",
    TdVmCall.SERVICE: "Service",
    TdVmCall.MIG_TD: "MigTD",
}
