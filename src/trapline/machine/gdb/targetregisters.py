"""The registers that gdb sees: their order on the wire and the description gdb reads.

Numbers follow from the order in the description. `org.gnu.gdb.i386.core` must hold the x87
registers too ("Debugging with GDB", section i386 Features); the engine interface has none, so
they read as unavailable. Control registers are in a feature of our own, which gdb shows with
the rest of `info registers all`.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

from trapline.cpu.engine import Reg

if TYPE_CHECKING:
    from collections.abc import Callable

    from trapline.cpu.engine import Vcpu

_MASK64: Final = (1 << 64) - 1
_MSR_FS_BASE: Final = 0xC0000100
_MSR_GS_BASE: Final = 0xC0000101
_MSR_KERNEL_GS_BASE: Final = 0xC0000102
_MSR_EFER: Final = 0xC0000080


class GdbRegister(NamedTuple):
    """One register. `get` None: unavailable; `put` None: cannot be written."""

    name: str
    bits: int
    kind: str
    feature: str
    get: "Callable[[Vcpu], int] | None" = None
    put: "Callable[[Vcpu, int], None] | None" = None

    @property
    def digits(self) -> int:
        """Length on the wire, in hexadecimal digits."""
        return self.bits // 4


_CORE: Final = "org.gnu.gdb.i386.core"
_SEGMENTS: Final = "org.gnu.gdb.i386.segments"
_CONTROL: Final = "org.trapline.control"

# In gdb's order, which is neither the encoding's nor the kernel's.
_GENERAL: Final = (
    *(Reg.RAX, Reg.RBX, Reg.RCX, Reg.RDX, Reg.RSI, Reg.RDI, Reg.RBP, Reg.RSP),
    *(Reg.R8, Reg.R9, Reg.R10, Reg.R11, Reg.R12, Reg.R13, Reg.R14, Reg.R15, Reg.RIP),
)
_POINTERS: Final = {Reg.RBP: "data_ptr", Reg.RSP: "data_ptr", Reg.RIP: "code_ptr"}


def _general(register: Reg) -> GdbRegister:
    def get(vcpu: "Vcpu") -> int:
        return int(vcpu.regs[register]) & _MASK64

    def put(vcpu: "Vcpu", value: int) -> None:
        vcpu.regs[register] = value

    kind = _POINTERS.get(register, "int64")
    return GdbRegister(register.name.lower(), 64, kind, _CORE, get, put)


def _get_flags(vcpu: "Vcpu") -> int:
    return vcpu.rflags & 0xFFFFFFFF


def _put_flags(vcpu: "Vcpu", value: int) -> None:
    vcpu.rflags = value


def _selector(name: str) -> GdbRegister:
    return GdbRegister(name, 32, "int32", _CORE, lambda vcpu: vcpu.segment(name).selector)


def _base(name: str, msr: int) -> GdbRegister:
    def put(vcpu: "Vcpu", value: int) -> None:
        vcpu.set_msr(msr, value)

    return GdbRegister(name, 64, "int", _SEGMENTS, lambda vcpu: vcpu.msr(msr), put)


def _control(number: int) -> GdbRegister:
    def put(vcpu: "Vcpu", value: int) -> None:
        vcpu.set_cr(number, value)

    return GdbRegister(
        f"cr{number}", 64, "int64", _CONTROL, lambda vcpu: vcpu.cr(number) & _MASK64, put
    )


def _msr(name: str, index: int) -> GdbRegister:
    return GdbRegister(name, 64, "int64", _CONTROL, lambda vcpu: vcpu.msr(index))


REGISTERS: Final = (
    *(_general(register) for register in _GENERAL),
    GdbRegister("eflags", 32, "i386_eflags", _CORE, _get_flags, _put_flags),
    *(_selector(name) for name in ("cs", "ss", "ds", "es", "fs", "gs")),
    *(GdbRegister(f"st{index}", 80, "i387_ext", _CORE) for index in range(8)),
    *(
        GdbRegister(name, 32, "int", _CORE)
        for name in ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")
    ),
    _base("fs_base", _MSR_FS_BASE),
    _base("gs_base", _MSR_GS_BASE),
    _msr("k_gs_base", _MSR_KERNEL_GS_BASE),
    *(_control(number) for number in (0, 2, 3, 4)),
    _msr("efer", _MSR_EFER),
)
RIP_NUMBER: Final = _GENERAL.index(Reg.RIP)

_FLAGS: Final = (
    *(("CF", 0), ("", 1), ("PF", 2), ("AF", 4), ("ZF", 6), ("SF", 7), ("TF", 8), ("IF", 9)),
    *(("DF", 10), ("OF", 11), ("NT", 14), ("RF", 16), ("VM", 17), ("AC", 18), ("VIF", 19)),
    *(("VIP", 20), ("ID", 21)),
)


def target_xml() -> bytes:
    """Return the target description document that describes `REGISTERS`."""
    fields = "".join(f'<field name="{name}" start="{bit}" end="{bit}"/>' for name, bit in _FLAGS)
    parts = [
        '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd">',
        "<target><architecture>i386:x86-64</architecture>",
    ]
    for feature in dict.fromkeys(register.feature for register in REGISTERS):
        parts.append(f'<feature name="{feature}">')
        if feature == _CORE:
            parts.append(f'<flags id="i386_eflags" size="4">{fields}</flags>')
        parts += [
            f'<reg name="{r.name}" bitsize="{r.bits}" type="{r.kind}"/>'
            for r in REGISTERS
            if r.feature == feature
        ]
        parts.append("</feature>")
    return "".join([*parts, "</target>"]).encode()


def read_register(vcpu: "Vcpu", register: GdbRegister) -> bytes:
    """Return the value in target byte order as hexadecimal, `xx…` when unavailable."""
    if register.get is None:
        return b"x" * register.digits
    value = register.get(vcpu) & ((1 << register.bits) - 1)
    return value.to_bytes(register.bits // 8, "little").hex().encode()


def write_register(vcpu: "Vcpu", register: GdbRegister, digits: bytes) -> bool:
    """Set a register from what came over the wire; False when it cannot be."""
    if register.put is None or len(digits) != register.digits:
        return False
    register.put(vcpu, int.from_bytes(bytes.fromhex(digits.decode("ascii")), "little"))
    return True
