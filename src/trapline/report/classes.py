"""What each trap class is called, and what happens to it in a TD.

`title` is for table cells, `summary` is one sentence, `details` is what a reader of one finding
needs to judge it. Sources: Intel SDM vol. 3C, 26.1; TDX module 1.5.01 `tdx_td_dispatcher.c`,
`td_msr_access.c`; Linux v6.12 arch/x86/coco/tdx/tdx.c `virt_exception_kernel()`.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class ClassText(NamedTuple):
    """The words for one trap class."""

    title: str
    summary: str
    details: str


# By `TrapClass`; a test checks that none is missing.
CLASSES: "Final[Mapping[str, ClassText]]" = {
    "mmio": ClassText(
        "MMIO",
        "Access to memory that the host emulates.",
        "The access is an EPT violation, which the TDX module gives the guest as #VE. Linux's "
        "handle_mmio() decodes the instruction and asks the host to do the access "
        "(TDVMCALL #VE.RequestMMIO). The host chooses what a read returns.",
    ),
    "pio": ClassText(
        "port I/O",
        "IN, OUT and their string forms.",
        "Always #VE (exit reason 30). Linux's handle_io() asks the host (TDVMCALL "
        "Instruction.IO) and refuses string forms. The host chooses what IN returns.",
    ),
    "msr": ClassText(
        "MSR",
        "Read or write of a model-specific register.",
        "By the number of the MSR, the TDX module lets it through, answers itself, raises #GP or "
        "gives #VE; MSRs it does not know are #VE. Linux then asks the host (TDVMCALL "
        "Instruction.RDMSR, Instruction.WRMSR).",
    ),
    "cpuid": ClassText(
        "CPUID",
        "CPUID instruction.",
        "By the leaf, the TDX module answers itself or gives #VE. Linux's handle_cpuid() asks the "
        "host for leaves 0x40000000 to 0x4fffffff and returns zero for all others.",
    ),
    "hlt": ClassText(
        "HLT",
        "HLT instruction.",
        "Always #VE (exit reason 12). Linux's handle_halt() asks the host to wait for an "
        "interrupt (TDVMCALL Instruction.HLT).",
    ),
    "mwait": ClassText(
        "MWAIT",
        "MWAIT instruction.",
        "Always #VE (exit reason 36). Linux's #VE handler has no case for it: an oops.",
    ),
    "monitor": ClassText(
        "MONITOR",
        "MONITOR instruction.",
        "Always #VE (exit reason 39). Linux's #VE handler has no case for it: an oops.",
    ),
    "wbinvd": ClassText(
        "WBINVD",
        "WBINVD, WBNOINVD or INVD instruction.",
        "Always #VE (exit reasons 54 and 13). Linux's #VE handler has no case for it: an oops.",
    ),
    "cr": ClassText(
        "CR0/CR4",
        "Write to CR0 or CR4.",
        "Only changing a bit that the TDX module owns is a #VE (exit reason 28), for which "
        "Linux's #VE handler has no case; a value that is natively invalid is #GP.",
    ),
    "tdcall": ClassText(
        "TDCALL",
        "Call of the TDX module.",
        "The guest's own call to the TDX module, or through it to the host; never a #VE. SEAMCALL "
        "and its kin are #UD in a TD.",
    ),
    "vmcall": ClassText(
        "VMCALL",
        "VMCALL or VMMCALL instruction.",
        "VMCALL is always #VE (exit reason 18), for which Linux's #VE handler has no case. VMMCALL "
        "is AMD's, and #UD.",
    ),
    "rdpmc": ClassText(
        "RDPMC",
        "Read of a performance counter.",
        "#GP unless the TD was built with ATTRIBUTES.PERFMON.",
    ),
    "encls": ClassText("ENCLS", "SGX supervisor instruction.", "#UD in a TD."),
    "xsetbv": ClassText(
        "XSETBV",
        "Write of an extended control register.",
        "Leaves the guest; the TDX module answers it, with no #VE.",
    ),
    "other": ClassText(
        "other",
        "Other instruction that leaves the guest unconditionally.",
        "VMX instructions, GETSEC, PCONFIG and their kin; most are #UD in a TD.",
    ),
}
