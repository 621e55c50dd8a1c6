"""Every private fact about libunicorn that the engine uses.

Source: unicorn 2.1.4 (QEMU 5.0.1), files named beside each group. Nothing else in trapline
holds an offset, a flag or an unpublished symbol of the library. Plain classes rather than
enumerations: looking up a member of an enumeration costs more than the memory access that it
is for. `selfcheck` tries each of them on a throw-away CPU once per process and raises
EngineMismatchError when one is not where it is expected.
"""

import ctypes
from enum import IntEnum
from typing import Any, Final

from unicorn import unicorn_const as const
from unicorn.unicorn_py3.unicorn import uclib
from unicorn.x86_const import UC_CPU_X86_SKYLAKE_CLIENT

from trapline.base.errors import EngineMismatchError

KNOWN_VERSION = "2.1.4"


class Uc:
    """Offsets in struct uc_struct (include/uc_priv.h)."""

    CPU: Final = 0x1B8
    NO_EXIT_REQUEST: Final = 0x7F2  # bool: leave out the check after each memory access
    NESTED_LEVEL: Final = 0x39F8  # int: which jump buffer cpu_exec uses


class Cpu:
    """Offsets in struct CPUState (qemu/include/hw/core/cpu.h)."""

    STOPPED: Final = 0x12  # bool
    EXIT_REQUEST: Final = 0x15  # bool
    CFLAGS_NEXT_TB: Final = 0x18  # u32
    INTERRUPT_REQUEST: Final = 0x1C  # u32
    ENV: Final = 0x128  # pointer to CPUX86State
    EXCEPTION_INDEX: Final = 0x81A0  # i32
    CLASS: Final = 0x81B0  # pointer to CPUClass
    ENV_BASE: Final = 0x8A50  # where CPUX86State starts, as it is part of X86CPU


class CpuClass:
    """Offsets in struct CPUClass (qemu/include/hw/core/cpu.h)."""

    TLB_FILL: Final = 0x48


class Hook:
    """Offsets in struct hook (include/uc_priv.h); a hook's handle is its address."""

    BEGIN: Final = 0x18  # u64, then END


class Env:
    """Offsets in CPUX86State (qemu/target/i386/cpu.h)."""

    REGS: Final = 0x0  # 16 x u64, then RIP
    EFLAGS: Final = 0x88  # u64; complete outside cpu_exec, without CC and DF inside it
    HFLAGS: Final = 0xB0  # u32
    HFLAGS2: Final = 0xB4  # u32
    SEGS: Final = 0xB8  # ES CS SS DS FS GS LDTR TR GDTR IDTR, 24 bytes each
    CR: Final = 0x1A8  # 9 x u64
    EFER: Final = 0x250
    FPSTT: Final = 0x25C  # u32, then x87: status and control word, tags
    FPREGS: Final = 0x270  # 8 x 16 bytes, the last of x87
    MXCSR: Final = 0x330  # u32, then a hole
    XMM: Final = 0x338  # 16 x 64 bytes, of which AVX would have the rest
    SYSENTER_CS: Final = 0x12C0  # u32
    SYSENTER_ESP: Final = 0x12C8
    SYSENTER_EIP: Final = 0x12D0
    STAR: Final = 0x12D8
    LSTAR: Final = 0x12E8
    CSTAR: Final = 0x12F0
    FMASK: Final = 0x12F8
    KERNEL_GS_BASE: Final = 0x1300
    TSC_AUX: Final = 0x1320
    PAT: Final = 0x14A0
    ERROR_CODE: Final = 0x1508  # i32
    EXCEPTION_IS_INT: Final = 0x150C  # i32
    EXCEPTION_NEXT_EIP: Final = 0x1510
    DR: Final = 0x1518  # 8 x u64
    HW_BREAKPOINTS: Final = 0x1558  # 4 pointers, one for each of DR0 to DR3
    OLD_EXCEPTION: Final = 0x1578  # i32
    VM_VMCB: Final = 0x1580
    INTERCEPT: Final = 0x1590  # u64, bit = exit code - 0x60
    INTERCEPT_CR_WRITE: Final = 0x159A  # u16
    INTERCEPT_EXCEPTIONS: Final = 0x15A0  # u32
    NESTED_CR3: Final = 0x15A8
    NESTED_PG_MODE: Final = 0x15B0  # u32
    RESET_END: Final = 0x15C0  # everything below is what a CPU reset clears: the CPU state proper
    FEATURES: Final = 0x1600  # u64 words, in the order of `Feature`


class Segs(IntEnum):
    """Index of each segment register at Env.SEGS, and the offsets inside one."""

    ES = 0
    CS = 1
    SS = 2
    DS = 3
    FS = 4
    GS = 5
    LDTR = 6
    TR = 7
    GDTR = 8
    IDTR = 9


SEGMENT_SIZE = 24
SEGMENT_SELECTOR = 0  # u32
SEGMENT_BASE = 8  # u64
SEGMENT_LIMIT = 16  # u32
SEGMENT_FLAGS = 20  # u32: the high descriptor word


class Feature:
    """Index of a CPUID feature word at Env.FEATURES (enum FeatureWord)."""

    LEAF_1_EDX: Final = 0
    LEAF_1_ECX: Final = 1
    LEAF_7_EBX: Final = 2
    LEAF_7_ECX: Final = 3
    LEAF_7_EDX: Final = 4
    LEAF_7_1_EAX: Final = 5
    LEAF_8000_0001_EDX: Final = 6
    LEAF_8000_0001_ECX: Final = 7
    XCR0_LOW: Final = 21  # FEAT_XSAVE_COMP_LO, _HI: what XSETBV takes
    XCR0_HIGH: Final = 22
    WORDS: Final = 23


class HFlags:
    """Bits of CPUX86State.hflags (HF_*)."""

    CPL: Final = 3
    INHIBIT_IRQ: Final = 1 << 3
    CS32: Final = 1 << 4
    SS32: Final = 1 << 5
    ADDSEG: Final = 1 << 6
    LMA: Final = 1 << 14
    CS64: Final = 1 << 15
    GUEST: Final = 1 << 21
    SMAP: Final = 1 << 23


class HFlags2:
    """Bits of CPUX86State.hflags2 (HF2_*)."""

    GIF: Final = 1 << 0
    HIF: Final = 1 << 1
    VINTR: Final = 1 << 3
    NPT: Final = 1 << 6


class InterruptRequest:
    """Bits of CPUState.interrupt_request (CPU_INTERRUPT_*)."""

    HARD: Final = 0x2
    VIRQ: Final = 0x100


class Svm:
    """AMD exit codes (qemu/target/i386/svm.h), and the engine's own beyond 0x300.

    Hooks see code + 0x100 (EXCP_VMEXIT).
    """

    CR_WRITE: Final = 0x10
    EXCEPTION: Final = 0x40
    INTR: Final = 0x60
    VINTR: Final = 0x64
    RDTSC: Final = 0x6E
    RDPMC: Final = 0x6F
    CPUID: Final = 0x72
    IRET: Final = 0x74
    SWINT: Final = 0x75
    INVD: Final = 0x76
    PAUSE: Final = 0x77
    HLT: Final = 0x78
    IOIO: Final = 0x7B
    MSR: Final = 0x7C
    SHUTDOWN: Final = 0x7F
    ICEBP: Final = 0x88
    WBINVD: Final = 0x89
    MONITOR: Final = 0x8A
    MWAIT: Final = 0x8B
    SYSCALL: Final = 0x300
    SYSENTER: Final = 0x301
    BREAKPOINT: Final = 0x302
    COUNT: Final = 0x303
    ENTRY: Final = 0x305
    DELIVER: Final = 0x304  # not an exit: asks the hook to deliver the event in the control block
    NPF: Final = 0x400


EXCP_VMEXIT = 0x100

# Bits of an exit's error code for Svm.NPF (SVM_NPTEXIT_*).
NPF_WRITE = 2
NPF_FETCH = 16

# Offsets in the VMCB page (qemu/target/i386/svm.h, struct vmcb_control_area).
VMCB_IOPM = 0x40
VMCB_MSRPM = 0x48
VMCB_EXIT_INFO_2 = 0x80

NESTED_MODE_LONG = 7  # SVM_NPT_PAE | SVM_NPT_LMA | SVM_NPT_NXE
PHYSICAL_BITS = 40  # TCG_PHYS_ADDR_BITS

PAGE_READ, PAGE_WRITE, PAGE_EXEC = 1, 2, 4

MMU_FETCH = 2  # enum MMUAccessType
MMU_STORE = 1
MMU_KSMAP = 0
MMU_USER = 1
MMU_KNOSMAP = 2

# Functions: argument types and result type. The first group is documented, the rest only
# exported; those without argument types are called by native code alone.
_POINTER = ctypes.c_void_p
_U32, _U64, _INT = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int
_SYMBOLS: dict[str, tuple[list[Any], Any]] = {
    "uc_version": ([_POINTER, _POINTER], _U32),
    "uc_open": ([_INT, _INT, _POINTER], _INT),
    "uc_close": ([_POINTER], _INT),
    "uc_ctl": ([], _INT),  # variadic
    "uc_reg_write": ([_POINTER, _INT, _POINTER], _INT),
    "uc_mem_map": ([_POINTER, _U64, ctypes.c_size_t, _U32], _INT),
    "uc_mem_write": ([_POINTER, _U64, ctypes.c_char_p, ctypes.c_size_t], _INT),
    "uc_emu_start": ([_POINTER, _U64, _U64, _U64, ctypes.c_size_t], _INT),
    "uc_mem_map_ptr": ([_POINTER, _U64, ctypes.c_size_t, _U32, _POINTER], _INT),
    "uc_hook_add": ([], _INT),  # variadic
    "cpu_exit": ([_POINTER], None),
    "cpu_reset_interrupt": ([_POINTER, _INT], None),
    "cpu_exec_x86_64": ([], None),
    "cpu_vmexit_x86_64": ([], None),
    "x86_cpu_do_interrupt_x86_64": ([], None),
    "do_interrupt_x86_hardirq_x86_64": ([], None),
    "x86_cpu_tlb_fill_x86_64": ([], None),
    "tlb_vaddr_to_host_x86_64": ([], None),
    "tlb_set_page_with_attrs_x86_64": ([], None),
    "tlb_flush_x86_64": ([_POINTER], None),
    "tb_flush_x86_64": ([_POINTER], None),
    "tb_invalidate_phys_range_x86_64": ([_POINTER, _U64, _U64], None),
    "cpu_x86_update_cr0_x86_64": ([_POINTER, _U32], None),
    "cpu_x86_update_cr3_x86_64": ([_POINTER, _U64], None),
    "cpu_x86_update_cr4_x86_64": ([_POINTER, _U32], None),
    "cpu_x86_update_dr7_x86_64": ([_POINTER, _U32], None),
}
_PINNED = f"install unicorn=={KNOWN_VERSION} from PyPI"
_CTL_WRITE = 1 << 30


class Library:
    """The loaded libunicorn with the functions of `_SYMBOLS`.

    A function is an attribute by its name without `_x86_64`; `address(name)` is where it is,
    for native code.
    """

    def __init__(self) -> None:
        # A second handle on the same library, so that argument types set here are not the
        # binding's own.
        library = ctypes.CDLL(uclib._name)  # noqa: SLF001 - the binding has no other way to the path
        self._functions: dict[str, Any] = {}
        for name, (arguments, result) in _SYMBOLS.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise EngineMismatchError(
                    f"the installed unicorn does not export {name}: {_PINNED}"
                ) from None
            function.restype = result
            if arguments:
                function.argtypes = arguments
            self._functions[name.removesuffix("_x86_64")] = function
        packed = self.uc_version(None, None)
        version = ".".join(str(packed >> shift & 0xFF) for shift in (24, 16, 8))
        if version != KNOWN_VERSION:
            raise EngineMismatchError(
                f"the software TD needs unicorn {KNOWN_VERSION} and {version} is installed: "
                f"{_PINNED}"
            )

    def address(self, name: str) -> int:
        """Return where the function is; `name` without `_x86_64`."""
        address = ctypes.cast(self._functions[name], ctypes.c_void_p).value
        assert address is not None
        return address

    def open_cpu(self, translation_buffer: int) -> int:
        """Create a CPU and return its handle; `translation_buffer` in bytes."""
        handle = ctypes.c_void_p()
        self.check(
            self.uc_open(const.UC_ARCH_X86, const.UC_MODE_64, ctypes.byref(handle)), "uc_open"
        )
        assert handle.value is not None
        for control, value in (
            (const.UC_CTL_CPU_MODEL, UC_CPU_X86_SKYLAKE_CLIENT),
            (const.UC_CTL_TCG_BUFFER_SIZE, translation_buffer),
            # Without a list of exits, one address would stop the run.
            (const.UC_CTL_UC_USE_EXITS, 1),
        ):
            word = ctypes.c_uint32(_CTL_WRITE | 1 << 26 | control)
            self.check(self.uc_ctl(handle, word, ctypes.c_uint32(value)), "uc_ctl")
        return handle.value

    @staticmethod
    def check(status: int, what: str) -> None:
        """Raise if a documented function failed."""
        if status:
            raise EngineMismatchError(f"unicorn's {what} failed with error {status}: {_PINNED}")

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - ctypes functions have no type
        try:
            return self._functions[name]
        except KeyError:
            raise AttributeError(name) from None


class Fields:
    """Typed windows onto one CPU: every field above that Python touches.

    Windows are memoryviews; an item read or write costs tens of nanoseconds, an attribute of
    a ctypes object several times that.
    """

    def __init__(self, uc: int) -> None:
        self.uc = uc
        self.cpu = _u64(uc + Uc.CPU)
        self.env = _u64(self.cpu + Cpu.ENV)
        if self.env != self.cpu + Cpu.ENV_BASE:
            raise EngineMismatchError(
                f"the installed unicorn has another internal layout than the one known: {_PINNED}"
            )
        self.env64 = window(self.env, Env.RESET_END, "Q")
        self.env32 = window(self.env, Env.RESET_END, "I")
        self.regs = self.env64[:17]
        self.cpu32 = window(self.cpu, Cpu.ENV_BASE, "I")
        self.cpu8 = window(self.cpu, Cpu.ENV_BASE, "B")
        self.uc8 = window(uc, Uc.NO_EXIT_REQUEST + 1, "B")
        self.nested_level = window(uc + Uc.NESTED_LEVEL, 4, "I")
        self.features = window(self.env + Env.FEATURES, 8 * Feature.WORDS, "Q")
        self.cr_intercepts = window(self.env + Env.INTERCEPT_CR_WRITE, 2, "H")
        self.tlb_fill = window(_u64(self.cpu + Cpu.CLASS) + CpuClass.TLB_FILL, 8, "Q")


def window(address: int, size: int, kind: str) -> memoryview:
    """Return host memory as a memoryview of items of struct format `kind`."""
    raw = (ctypes.c_ubyte * size).from_address(address)
    return memoryview(raw).cast("B").cast(kind)  # type: ignore[call-overload,no-any-return]


def _u64(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value
