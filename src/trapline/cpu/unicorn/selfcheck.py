"""Does the loaded library have the layout that `libunicorn` states? Tried once per process.

`check_fields` reads a throw-away CPU through /proc/self/mem, so that a wrong offset gives an
error and not a crash: registers written by the documented API must appear at their offsets,
and fields without an API must hold what a fresh CPU holds. `check_behaviour` then runs a guest
of a few instructions and looks at what no fresh CPU shows: intercepts, nested paging, event
delivery, single steps.
"""

import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final

from iced_x86 import Code, Instruction, Register
from unicorn import unicorn_const as const
from unicorn import x86_const as x86

from trapline.base.errors import EngineMismatchError
from trapline.cpu.engine import Engine, Exit, PageState, Reg, SegmentRegister, Vcpu
from trapline.cpu.unicorn.assembler import Assembler
from trapline.cpu.unicorn.libunicorn import (
    KNOWN_VERSION,
    SEGMENT_BASE,
    SEGMENT_LIMIT,
    SEGMENT_SELECTOR,
    SEGMENT_SIZE,
    Cpu,
    CpuClass,
    Env,
    Feature,
    InterruptRequest,
    Library,
    Segs,
    Uc,
)

_BUFFER: Final = 1 << 20
_SCE_LME: Final = 0x101
_LMA: Final = 0x400  # set in a CPU that starts in 64-bit mode, and not written by WRMSR
_IF: Final = 0x200


class _Msr(ctypes.Structure):
    _fields_ = (("index", ctypes.c_uint32), ("value", ctypes.c_uint64))


class _Vector(ctypes.Structure):
    """What XMM and ST registers are written from; ST takes 10 bytes."""

    _fields_ = (("low", ctypes.c_uint64), ("high", ctypes.c_uint64))


class _Table(ctypes.Structure):
    _fields_ = (
        ("selector", ctypes.c_uint16),
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class _Probe:
    """A CPU that is thrown away, and safe reads of host memory."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        self.uc = library.open_cpu(_BUFFER)
        self.cpu = self.env = 0
        self.write(x86.UC_X86_REG_RAX, 0)  # the CPU is made by the first call

    def close(self) -> None:
        self._library.uc_close(self.uc)
        os.close(self._memory)

    def peek(self, address: int, size: int = 8) -> int | None:
        try:
            return int.from_bytes(os.pread(self._memory, size, address), "little")
        except (OSError, OverflowError):
            return None

    def write(self, register: int, value: Any) -> None:  # noqa: ANN401 - an int or a structure
        holder = value if isinstance(value, ctypes.Structure) else ctypes.c_uint64(value)
        status = self._library.uc_reg_write(self.uc, register, ctypes.byref(holder))
        self._library.check(status, "uc_reg_write")


def check_fields(library: Library) -> None:
    """Raise EngineMismatchError unless every field is where it is said to be."""
    probe = _Probe(library)
    try:
        _find_cpu(probe)
        for name, address, size, expected in _expectations(probe, library):
            if probe.peek(address, size) != expected:
                raise _mismatch(f"{name} is not where it should be")
    finally:
        probe.close()


def _mismatch(what: str) -> EngineMismatchError:
    return EngineMismatchError(
        f"the installed unicorn is not the build that trapline knows ({what}): "
        f"install unicorn=={KNOWN_VERSION} from PyPI"
    )


def _find_cpu(probe: _Probe) -> None:
    cpu = probe.peek(probe.uc + Uc.CPU)
    env = None if cpu is None else probe.peek(cpu + Cpu.ENV)
    if cpu is None or env is None or env != cpu + Cpu.ENV_BASE or probe.peek(env) is None:
        raise _mismatch("the CPU state is not where it should be")
    probe.cpu, probe.env = cpu, env


_Expectation = tuple[str, int, int, int]


def _expectations(probe: _Probe, library: Library) -> Iterator[_Expectation]:
    """Yield name, address, size and expected value of each field."""
    yield from _fresh_fields(probe, library)
    yield from _request_fields(probe, library)
    yield from _register_fields(probe)
    yield from _fpu_fields(probe)
    yield from _segment_fields(probe)
    yield from _msr_fields(probe)
    # Last, as it runs the CPU.
    if _nested_level_inside(probe, library) != 1:
        raise _mismatch("nested_level is not where it should be")


def _fresh_fields(probe: _Probe, library: Library) -> Iterator[_Expectation]:
    """Fields that no API writes, by what they hold after uc_open."""
    uc, cpu, env = probe.uc, probe.cpu, probe.env
    minus_one = 0xFFFFFFFF
    yield "no_exit_request", uc + Uc.NO_EXIT_REQUEST, 1, 0
    yield "init_done", uc + Uc.NO_EXIT_REQUEST + 1, 1, 1
    yield "nested_level", uc + Uc.NESTED_LEVEL, 4, 0
    yield "stopped", cpu + Cpu.STOPPED, 1, 1
    yield "cflags_next_tb", cpu + Cpu.CFLAGS_NEXT_TB, 4, minus_one
    yield "exception_index", cpu + Cpu.EXCEPTION_INDEX, 4, minus_one
    yield "old_exception", env + Env.OLD_EXCEPTION, 4, minus_one
    cpu_class = probe.peek(cpu + Cpu.CLASS) or 0
    fill = library.address("x86_cpu_tlb_fill")
    yield "tlb_fill", cpu_class + CpuClass.TLB_FILL, 8, fill
    yield "tlb_fill_cpu", cpu_class + CpuClass.TLB_FILL + 8, 8, fill
    # Skylake-Client as QEMU 5.0.1 has it, less what TCG lacks.
    yield "features", env + Env.FEATURES + 8 * Feature.LEAF_1_EDX, 4, 0x078BFBFD
    yield "features", env + Env.FEATURES + 8 * Feature.LEAF_8000_0001_ECX, 4, 0x21
    yield "features", env + Env.FEATURES + 8 * Feature.XCR0_LOW, 8, 0x7


_Callback = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p
)


def _nested_level_inside(probe: _Probe, library: Library) -> int:
    """Return what the field holds while uc_emu_start runs one NOP."""
    levels: list[int] = []
    at = probe.uc + Uc.NESTED_LEVEL
    note = _Callback(lambda *_: levels.append(probe.peek(at, 4) or 0))
    handle = ctypes.c_size_t()
    library.check(library.uc_mem_map(probe.uc, 0, 0x1000, const.UC_PROT_ALL), "uc_mem_map")
    library.check(library.uc_mem_write(probe.uc, 0, b"\x90", 1), "uc_mem_write")
    library.check(
        library.uc_hook_add(
            ctypes.c_void_p(probe.uc),
            ctypes.byref(handle),
            ctypes.c_int(const.UC_HOOK_BLOCK),
            note,
            None,
            ctypes.c_uint64(1),
            ctypes.c_uint64(0),
        ),
        "uc_hook_add",
    )
    library.check(library.uc_emu_start(probe.uc, 0, 0, 0, 1), "uc_emu_start")
    return levels[0] if levels else 0


def _request_fields(probe: _Probe, library: Library) -> Iterator[_Expectation]:
    """Fields that the library's own functions change."""
    cpu = probe.cpu
    yield "exit_request", cpu + Cpu.EXIT_REQUEST, 1, 0
    library.cpu_exit(cpu)
    yield "exit_request", cpu + Cpu.EXIT_REQUEST, 1, 1
    yield "interrupt_request", cpu + Cpu.INTERRUPT_REQUEST, 4, 0
    inside = 0 <= Cpu.INTERRUPT_REQUEST < Cpu.ENV_BASE
    if not inside or _after_reset(cpu, library) != InterruptRequest.VIRQ:
        raise _mismatch("interrupt_request is not where it should be")


def _after_reset(cpu: int, library: Library) -> int:
    """Set two requests, have the library take back one, and return what is left."""
    request = ctypes.c_uint32.from_address(cpu + Cpu.INTERRUPT_REQUEST)
    request.value = InterruptRequest.HARD | InterruptRequest.VIRQ
    library.cpu_reset_interrupt(cpu, InterruptRequest.HARD)
    left = request.value
    request.value = 0
    return left


def _register_fields(probe: _Probe) -> Iterator[_Expectation]:
    env = probe.env
    names = ["RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI"]
    names += [*(f"R{number}" for number in range(8, 16)), "RIP"]
    for index, name in enumerate(names):
        value = 0x5A00_1234_0000_0000 + index
        probe.write(getattr(x86, f"UC_X86_REG_{name}"), value)
        yield name, env + Env.REGS + 8 * index, 8, value
    for number in (0, 1, 2, 3, 6, 7):
        value = 0x5000 + 16 * number
        probe.write(getattr(x86, f"UC_X86_REG_DR{number}"), value)
        yield f"DR{number}", env + Env.DR + 8 * number, 8, value
    for number in (2, 3, 4):
        value = 0x7A000 + 0x1000 * number
        probe.write(getattr(x86, f"UC_X86_REG_CR{number}"), value)
        yield f"CR{number}", env + Env.CR + 8 * number, 8, value
    probe.write(x86.UC_X86_REG_EFLAGS, 2 | _IF)
    yield "EFLAGS", env + Env.EFLAGS, 8, 2 | _IF


def _fpu_fields(probe: _Probe) -> Iterator[_Expectation]:
    env = probe.env
    for number in (0, 15):
        low = 0x5A01_1234_0000_0000 + number
        probe.write(getattr(x86, f"UC_X86_REG_XMM{number}"), _Vector(low, 0x66))
        yield f"XMM{number}", env + Env.XMM + 64 * number, 8, low
        yield f"XMM{number}", env + Env.XMM + 64 * number + 8, 8, 0x66
    probe.write(x86.UC_X86_REG_MXCSR, 0x1FA0)
    yield "MXCSR", env + Env.MXCSR, 4, 0x1FA0
    probe.write(x86.UC_X86_REG_FPSW, 0)
    yield "FPSTT", env + Env.FPSTT, 4, 0
    probe.write(x86.UC_X86_REG_FPCW, 0x0A5F)
    yield "FPCW", env + Env.FPSTT + 6, 2, 0x0A5F
    for number in (0, 7):
        mantissa = 0x8000_1234_0000_0000 + number
        probe.write(getattr(x86, f"UC_X86_REG_ST{number}"), _Vector(mantissa, 0x4001))
        yield f"ST{number}", env + Env.FPREGS + 16 * number, 8, mantissa


def _segment_fields(probe: _Probe) -> Iterator[_Expectation]:
    env = probe.env
    for name in ("LDTR", "TR", "GDTR", "IDTR"):
        index = Segs[name]
        at = env + Env.SEGS + SEGMENT_SIZE * index
        table = _Table(0x28 + index, 0x6600_0000_1000 + index, 0x77 + index, 0x8B00)
        probe.write(getattr(x86, f"UC_X86_REG_{name}"), table)
        yield name, at + SEGMENT_BASE, 8, table.base
        yield name, at + SEGMENT_LIMIT, 4, table.limit
        if name in {"LDTR", "TR"}:
            yield name, at + SEGMENT_SELECTOR, 2, table.selector
    for name in ("FS", "GS"):
        at = env + Env.SEGS + SEGMENT_SIZE * Segs[name]
        value = 0x7000_0000_0000 + Segs[name]
        probe.write(getattr(x86, f"UC_X86_REG_{name}_BASE"), value)
        yield name, at + SEGMENT_BASE, 8, value


def _msr_fields(probe: _Probe) -> Iterator[_Expectation]:
    env = probe.env
    offsets = {
        0x175: Env.SYSENTER_ESP,
        0x176: Env.SYSENTER_EIP,
        0x277: Env.PAT,
        0xC0000081: Env.STAR,
        0xC0000082: Env.LSTAR,
        0xC0000083: Env.CSTAR,
        0xC0000084: Env.FMASK,
        0xC0000102: Env.KERNEL_GS_BASE,
        0xC0000103: Env.TSC_AUX,
    }
    for index, offset in offsets.items():
        value = 0x0606_0606_0606 + (index & 0xFF)
        probe.write(x86.UC_X86_REG_MSR, _Msr(index, value))
        yield f"MSR {index:#x}", env + offset, 8, value
    probe.write(x86.UC_X86_REG_MSR, _Msr(0x174, 0x77))
    yield "MSR 0x174", env + Env.SYSENTER_CS, 4, 0x77
    probe.write(x86.UC_X86_REG_MSR, _Msr(0xC0000080, _SCE_LME))
    yield "EFER", env + Env.EFER, 8, _SCE_LME | _LMA


# The guest of check_behaviour: where its parts are.
_RAM: Final = 4 << 20
_GDT: Final = 0x1000
_IDT: Final = 0x2000
_TABLES: Final = 0x4000
_CODE: Final = 0x100000
_STACK: Final = 0x200000
_PAGE: Final = 0x300000
_VECTOR: Final = 0x40


def check_behaviour(create: Callable[[int], Engine]) -> None:
    """Run a guest on a new engine; raise EngineMismatchError unless all goes as it should."""
    engine = create(_RAM)
    try:
        seen = _run(engine.vcpus[0])
    finally:
        engine.close()
    if seen != _EXPECTED:
        raise _mismatch(f"a probe saw {seen[-1] if seen else 'nothing'} at step {len(seen)}")


# Kind of exit, and what is special about it.
_EXPECTED: Final = [
    (Exit.BOUNDARY, _CODE),
    (Exit.INTERRUPT_WINDOW, _CODE),
    (Exit.CPUID, _CODE),
    (Exit.RDMSR, 0x10),
    (Exit.TDCALL, 4),
    (Exit.IO, 0x42),
    (Exit.CR_WRITE, 0x40),
    (Exit.EPT_VIOLATION, _PAGE + 8, True),
    (Exit.EXCEPTION, 0, 0),
    (Exit.HLT, _STACK - 40),
    (Exit.UNDEFINED, _CODE + 0x1001),
    (Exit.TRIPLE_FAULT, 0),
]


def _program() -> bytes:
    a = Assembler()
    a.emit(Instruction.create(Code.CPUID))
    a.set(Register.RCX, 0x10)
    a.emit(Instruction.create(Code.RDMSR))
    a.emit(Instruction.create(Code.TDCALL))
    a.emit(Instruction.create_reg_i32(Code.IN_AL_IMM8, Register.AL, 0x42))
    a.reg_reg(Code.MOV_R64_CR, Register.RAX, Register.CR4)
    a.reg_imm(Code.OR_RM32_IMM8, Register.EAX, 0x40)
    a.reg_reg(Code.MOV_CR_R64, Register.CR4, Register.RAX)
    a.set(Register.RBX, _PAGE)
    a.store(Register.RBX, 8, Register.RAX)
    a.emit(Instruction.create_i32(Code.INT_IMM8, _VECTOR))
    a.reg_reg(Code.XOR_RM32_R32, Register.ECX, Register.ECX)
    a.reg_reg(Code.XOR_RM32_R32, Register.EDX, Register.EDX)
    a.reg(Code.DIV_RM32, Register.ECX)
    return a.encode(_CODE)


def _place(vcpu: Vcpu) -> None:
    ram = vcpu.memory.ram
    code = _program()
    ram[_CODE : _CODE + len(code)] = code
    # Where the divide error goes: HLT, then UD2, for which there is no gate.
    ram[_CODE + 0x1000 : _CODE + 0x1003] = b"\xf4\x0f\x0b"
    ram[_CODE + 0x2000 : _CODE + 0x2002] = b"\x48\xcf"  # IRETQ: where INT n goes
    ram[_GDT : _GDT + 24] = struct.pack("<3Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
    for vector, handler in ((0, _CODE + 0x1000), (_VECTOR, _CODE + 0x2000)):
        gate = handler & 0xFFFF | 8 << 16 | 0x8E << 40 | handler >> 16 << 48
        ram[_IDT + 16 * vector : _IDT + 16 * vector + 8] = struct.pack("<Q", gate)
    ram[_TABLES : _TABLES + 8] = struct.pack("<Q", _TABLES + 0x1000 | 7)
    ram[_TABLES + 0x1000 : _TABLES + 0x1008] = struct.pack("<Q", _TABLES + 0x2000 | 7)
    ram[_TABLES + 0x2000 : _TABLES + 0x2010] = struct.pack("<2Q", 0x87, 0x200087)
    vcpu.set_segment("gdtr", SegmentRegister(0, _GDT, 23, 0))
    vcpu.set_segment("idtr", SegmentRegister(0, _IDT, 0xFFF, 0))
    vcpu.set_msr(0xC0000080, 0xD00)
    vcpu.set_cr(4, 0x20)
    vcpu.set_cr(3, _TABLES)
    vcpu.set_cr(0, 0x80010033)
    vcpu.set_segment("cs", SegmentRegister(8, 0, 0xFFFFFFFF, 0x00AF9B00))
    for name in ("ss", "ds", "es"):
        vcpu.set_segment(name, SegmentRegister(16, 0, 0xFFFFFFFF, 0x00CF9300))
    vcpu.rflags = 2
    vcpu.regs[Reg.RIP] = _CODE
    vcpu.regs[Reg.RSP] = _STACK


def _run(vcpu: Vcpu) -> list[tuple[int, ...]]:
    _place(vcpu)
    vcpu.memory.set_private(_PAGE, 0x1000, PageState.ABSENT)
    vcpu.watch_cr(4, 0x40)
    vcpu.intercept_exceptions(frozenset({0}))
    vcpu.set_time_budget(100_000)
    vcpu.request_boundary()
    vcpu.request_interrupt_window(True)
    vcpu.rflags = 2 | _IF
    seen: list[tuple[int, ...]] = []
    details: dict[Exit, Callable[[], tuple[int, ...]]] = {
        Exit.BOUNDARY: lambda: (vcpu.regs[Reg.RIP],),
        Exit.INTERRUPT_WINDOW: lambda: (vcpu.regs[Reg.RIP],),
        Exit.CPUID: lambda: (vcpu.regs[Reg.RIP],),
        Exit.RDMSR: lambda: (vcpu.regs[Reg.RCX],),
        Exit.TDCALL: lambda: (vcpu.length,),
        Exit.IO: lambda: (vcpu.io.port,),
        Exit.CR_WRITE: lambda: (vcpu.cr_write.value & 0x40,),
        Exit.EPT_VIOLATION: lambda: (vcpu.ept.gpa, vcpu.ept.is_write),
        Exit.EXCEPTION: lambda: (vcpu.fault.vector, vcpu.fault.error_code),
        Exit.HLT: lambda: (vcpu.regs[Reg.RSP],),
        Exit.UNDEFINED: lambda: (vcpu.regs[Reg.RIP],),
        Exit.TRIPLE_FAULT: lambda: (vcpu.cpl,),
    }

    def handler(kind: Exit) -> None:
        seen.append((kind, *details.get(kind, lambda: ())()))
        if seen != _EXPECTED[: len(seen)] or kind is Exit.TRIPLE_FAULT:
            vcpu.stop()
        elif kind is Exit.BOUNDARY:
            pass
        elif kind is Exit.INTERRUPT_WINDOW:
            vcpu.request_interrupt_window(False)
        elif kind is Exit.EXCEPTION and vcpu.fault.vector == 0:
            vcpu.deliver(0)
        elif kind is Exit.UNDEFINED:
            vcpu.intercept_exceptions(frozenset())
            vcpu.deliver(6)
        else:
            vcpu.advance(vcpu.length)

    vcpu.run(handler)
    return seen
