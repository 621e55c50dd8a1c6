"""Registers, control registers, segments and MSRs of the CPU, from outside cpu_exec."""

import ctypes
from typing import Final

from trapline.cpu.engine import SegmentRegister
from trapline.cpu.unicorn.core import Core
from trapline.cpu.unicorn.libunicorn import (
    SEGMENT_BASE,
    SEGMENT_FLAGS,
    SEGMENT_LIMIT,
    SEGMENT_SELECTOR,
    SEGMENT_SIZE,
    Env,
    Feature,
    HFlags,
    Segs,
)

IA32_TSC = 0x10
IA32_SYSENTER_CS = 0x174
IA32_SYSENTER_ESP = 0x175
IA32_SYSENTER_EIP = 0x176
IA32_PAT = 0x277
IA32_EFER = 0xC0000080
IA32_STAR = 0xC0000081
IA32_LSTAR = 0xC0000082
IA32_CSTAR = 0xC0000083
IA32_FMASK = 0xC0000084
IA32_FS_BASE = 0xC0000100
IA32_GS_BASE = 0xC0000101
IA32_KERNEL_GS_BASE = 0xC0000102
IA32_TSC_AUX = 0xC0000103

EFER_SCE = 1 << 0
EFER_LMA = 1 << 10

CR0_PE = 1 << 0
CR0_PG = 1 << 31
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_OSFXSR = 1 << 9

RFLAGS_TF = 1 << 8
RFLAGS_IF = 1 << 9
RFLAGS_RF = 1 << 16
RFLAGS_VM = 1 << 17
RFLAGS_WRITABLE = 0x3F7FD7
RFLAGS_FIXED = 1 << 1

_DESCRIPTOR_LONG = 1 << 21
_DESCRIPTOR_BIG = 1 << 22
_DPL_SHIFT = 13
_CS_FLAGS = (Env.SEGS + SEGMENT_SIZE * Segs.CS + SEGMENT_FLAGS) // 4
_SS_FLAGS = (Env.SEGS + SEGMENT_SIZE * Segs.SS + SEGMENT_FLAGS) // 4

# Index of each segment register in words of 32 bits.
_SEGMENT_AT: Final = {
    name.lower(): (Env.SEGS + SEGMENT_SIZE * index) // 4 for name, index in Segs.__members__.items()
}
_SELECTOR, _BASE = SEGMENT_SELECTOR // 4, SEGMENT_BASE // 8
_LIMIT, _ATTRIBUTES = SEGMENT_LIMIT // 4, SEGMENT_FLAGS // 4
_EFER: Final = Env.EFER // 8
_HFLAGS: Final = Env.HFLAGS // 4
_CLEARED: Final = ~(HFlags.CPL | HFlags.CS32 | HFlags.CS64 | HFlags.SS32 | HFlags.ADDSEG)
_LMA, _LONG = HFlags.LMA, HFlags.CS32 | HFlags.CS64 | HFlags.SS32

_MSR_FIELDS: Final[dict[int, int]] = {
    IA32_SYSENTER_ESP: Env.SYSENTER_ESP,
    IA32_SYSENTER_EIP: Env.SYSENTER_EIP,
    IA32_PAT: Env.PAT,
    IA32_STAR: Env.STAR,
    IA32_LSTAR: Env.LSTAR,
    IA32_CSTAR: Env.CSTAR,
    IA32_FMASK: Env.FMASK,
    IA32_FS_BASE: Env.SEGS + Segs.FS * SEGMENT_SIZE + SEGMENT_BASE,
    IA32_GS_BASE: Env.SEGS + Segs.GS * SEGMENT_SIZE + SEGMENT_BASE,
    IA32_KERNEL_GS_BASE: Env.KERNEL_GS_BASE,
    IA32_TSC_AUX: Env.TSC_AUX,
}

# What the core can decode and execute, by CPUID word. RDRAND and RDSEED are absent, so that
# they reach the engine, which answers from a seeded generator. Source: QEMU 5.0.1
# target/i386/cpu.c, TCG_*_FEATURES; AVX, XSAVES, PCID, INVPCID, CET are not in it. MONITOR is
# there so that it exits.
_CORE_FEATURES: Final[dict[int, int]] = {
    Feature.LEAF_1_EDX: 0x0F8BFBFF,
    Feature.LEAF_1_ECX: sum(1 << b for b in (0, 1, 3, 9, 13, 19, 20, 21, 22, 23, 24, 25, 26)),
    Feature.LEAF_7_EBX: sum(1 << b for b in (0, 3, 7, 8, 9, 19, 20, 23, 24)),
    Feature.LEAF_7_ECX: 0,
    Feature.LEAF_7_EDX: 0,
    Feature.LEAF_7_1_EAX: 0,
    Feature.LEAF_8000_0001_EDX: sum(1 << b for b in (11, 20, 26, 27, 29)),
    Feature.LEAF_8000_0001_ECX: sum(1 << b for b in (0, 5, 8)),
    Feature.XCR0_LOW: 0x3,  # x87 and SSE; it would take AVX, which it cannot execute
    Feature.XCR0_HIGH: 0,
}
_X87 = Env.FPREGS + 8 * 16 - Env.FPSTT
_SSE = Env.XMM + 16 * 64 - Env.MXCSR
_BMI = 1 << 3 | 1 << 8  # BMI1, BMI2 in leaf 7 EBX
_MONITOR = 1 << 3  # leaf 1 ECX
_RDRAND = 1 << 30  # leaf 1 ECX
_RDSEED = 1 << 18  # leaf 7 EBX


def is_core_msr(index: int) -> bool:
    """Say whether RDMSR and WRMSR of the core itself act on this MSR.

    Not on EFER: its SCE is kept from the core, so that SYSRET is undefined to it and the engine
    executes it.
    """
    return index in _MSR_FIELDS or index == IA32_SYSENTER_CS


class RegisterFile:
    """The state of a core by name; `regs` are the 17 of `trapline.cpu.engine.Reg`."""

    def __init__(self, core: Core) -> None:
        fields = core.fields
        library = core.library
        self._update_cr = {
            0: library.cpu_x86_update_cr0,
            3: library.cpu_x86_update_cr3,
            4: library.cpu_x86_update_cr4,
        }
        self._env = fields.env
        self.regs = fields.regs
        self._env64 = fields.env64
        self._env32 = fields.env32
        self._other_msrs: dict[int, int] = {}
        for word, value in _CORE_FEATURES.items():
            fields.features[word] = value

    @property
    def cpuid_features(self) -> dict[tuple[int, int, str], int]:
        """The CPUID feature bits that the engine can execute, as (leaf, subleaf, register).

        BMI1 and BMI2 need CR4.OSFXSR on this core (QEMU 5.0.1 decodes VEX forms as SSE), so
        they appear when the guest has set it.
        """
        words = dict(_CORE_FEATURES)
        if not self.cr(4) & CR4_OSFXSR:
            words[Feature.LEAF_7_EBX] &= ~_BMI
        return {
            (1, 0, "edx"): words[Feature.LEAF_1_EDX],
            (1, 0, "ecx"): words[Feature.LEAF_1_ECX] & ~_MONITOR | _RDRAND,
            (7, 0, "ebx"): words[Feature.LEAF_7_EBX] | _RDSEED,
            (7, 0, "ecx"): 0,
            (7, 0, "edx"): 0,
            (0x80000001, 0, "edx"): words[Feature.LEAF_8000_0001_EDX],
            (0x80000001, 0, "ecx"): words[Feature.LEAF_8000_0001_ECX],
        }

    @property
    def rflags(self) -> int:
        """RFLAGS, complete."""
        return self._env64[Env.EFLAGS // 8]

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._env64[Env.EFLAGS // 8] = value & RFLAGS_WRITABLE | RFLAGS_FIXED

    @property
    def fpu(self) -> bytes:
        """The x87 and SSE registers with their control words."""
        env = self._env
        return ctypes.string_at(env + Env.FPSTT, _X87) + ctypes.string_at(env + Env.MXCSR, _SSE)

    @fpu.setter
    def fpu(self, value: bytes) -> None:
        if len(value) != _X87 + _SSE:
            raise ValueError("this is no x87 and SSE state of this engine")
        env = self._env
        ctypes.memmove(env + Env.FPSTT, value[:_X87], _X87)
        ctypes.memmove(env + Env.MXCSR, value[_X87:], _SSE)

    @property
    def cpl(self) -> int:
        """Current privilege level."""
        return self._env32[Env.HFLAGS // 4] & HFlags.CPL

    @property
    def bits(self) -> int:
        """Width of the code that executes: 64, 32 or 16."""
        flags = self._env32[Env.HFLAGS // 4]
        return 64 if flags & HFlags.CS64 else 32 if flags & HFlags.CS32 else 16

    @property
    def interrupt_shadow(self) -> bool:
        """The instruction before was STI (with IF clear) or MOV/POP SS."""
        return bool(self._env32[Env.HFLAGS // 4] & HFlags.INHIBIT_IRQ)

    def cr(self, number: int) -> int:
        """Return CR0, CR2, CR3, CR4 or CR8."""
        return self._env64[Env.CR // 8 + number]

    def set_cr(self, number: int, value: int) -> None:
        """Write a control register as MOV does, mode changes and TLB flushes included."""
        update = self._update_cr.get(number)
        if update is None:
            self._env64[Env.CR // 8 + number] = value
        else:
            update(self._env, value)

    def dr(self, number: int) -> int:
        """Return DR0 to DR3, DR6 or DR7."""
        return self._env64[Env.DR // 8 + number]

    def segment(self, name: str) -> SegmentRegister:
        """Return a segment or table register."""
        at = _SEGMENT_AT[name]
        words = self._env32
        base = self._env64[at // 2 + _BASE]
        return SegmentRegister(words[at], base, words[at + _LIMIT], words[at + _ATTRIBUTES])

    def set_segment(self, name: str, value: SegmentRegister) -> None:
        """Write a segment or table register with its hidden part, and what follows from it."""
        self.load_segment(name, value)
        self._derive_hflags()

    def load_segment(self, name: str, value: SegmentRegister) -> None:
        """Write a segment register; `set_segment` of another has to follow."""
        at = _SEGMENT_AT[name]
        words = self._env32
        words[at + _SELECTOR], self._env64[at // 2 + _BASE], limit, attributes = value
        words[at + _LIMIT], words[at + _ATTRIBUTES] = limit, attributes

    def _derive_hflags(self) -> None:
        """Recompute what the core derives from CS and SS (cpu_x86_load_seg_cache)."""
        words = self._env32
        flags = words[_HFLAGS] & _CLEARED
        cs, ss = words[_CS_FLAGS], words[_SS_FLAGS]
        flags |= ss >> _DPL_SHIFT & 3
        if flags & _LMA and cs & _DESCRIPTOR_LONG:
            flags |= _LONG
        else:
            flags |= HFlags.CS32 if cs & _DESCRIPTOR_BIG else 0
            flags |= HFlags.SS32 if ss & _DESCRIPTOR_BIG else 0
            real = not self.cr(0) & CR0_PE or self.rflags & RFLAGS_VM
            based = self.segment("ss").base or self.segment("ds").base or self.segment("es").base
            if real or not flags & HFlags.CS32 or based:
                flags |= HFlags.ADDSEG
        words[Env.HFLAGS // 4] = flags

    def msr(self, index: int) -> int:
        """Return an MSR as the CPU holds it; one that was never written reads 0."""
        if index == IA32_EFER:
            return self._env64[_EFER] | self._other_msrs.get(IA32_EFER, 0)
        if index == IA32_SYSENTER_CS:
            return self._env32[Env.SYSENTER_CS // 4]
        if index in _MSR_FIELDS:
            return self._env64[_MSR_FIELDS[index] // 8]
        return self._other_msrs.get(index, 0)

    def set_msr(self, index: int, value: int) -> None:
        """Write an MSR into the CPU, without any check."""
        if index == IA32_EFER:
            self._env64[Env.EFER // 8] = value & ~EFER_SCE
            self._other_msrs[IA32_EFER] = value & EFER_SCE
            flags = self._env32[Env.HFLAGS // 4] & ~HFlags.LMA
            self._env32[Env.HFLAGS // 4] = flags | (HFlags.LMA if value & EFER_LMA else 0)
        elif index == IA32_SYSENTER_CS:
            self._env32[Env.SYSENTER_CS // 4] = value & 0xFFFFFFFF
        elif index in _MSR_FIELDS:
            self._env64[_MSR_FIELDS[index] // 8] = value
        else:
            self._other_msrs[index] = value

    def save(self) -> dict[int, int]:
        """Return the MSRs that the core does not keep."""
        return dict(self._other_msrs)

    def load(self, saved: dict[int, int]) -> None:
        """Return to a saved state."""
        self._other_msrs = dict(saved)
