"""What a scan of one object must know of its kernel: paravirt table, #VE handler."""

from typing import TYPE_CHECKING, Final

import msgspec

from trapline.kernel.types.btf import Btf
from trapline.linux.accessors import PARAVIRT, PARAVIRT_MAPPERS
from trapline.linux.ve_handler import VeHandler

if TYPE_CHECKING:
    from trapline.kernel.binary import Binary

PV_OPS: Final = "pv_ops"
_PV_STRUCT: Final = "paravirt_patch_template"  # the type of pv_ops
_POINTER: Final = 8
# What pv_ops holds at link time, for kernels without BTF: arch/x86/kernel/paravirt.c.
_NATIVE: Final = {
    "native_io_delay": "cpu.io_delay",
    "native_cpuid": "cpu.cpuid",
    "native_read_msr": "cpu.read_msr",
    "native_read_msr_safe": "cpu.read_msr_safe",
    "native_write_msr": "cpu.write_msr",
    "native_write_msr_safe": "cpu.write_msr_safe",
    "native_read_pmc": "cpu.read_pmc",
    "native_write_cr0": "cpu.write_cr0",
    "native_write_cr4": "cpu.write_cr4",
    "native_wbinvd": "cpu.wbinvd",
    "native_safe_halt": "irq.safe_halt",
    "native_halt": "irq.halt",
    "native_set_fixmap": "mmu.set_fixmap",
}
# enum insn_mmio_type was enum mmio_type before v6.3.
_MMIO_ENUMS: Final = ("insn_mmio_type", "mmio_type")
_MAX_MEMBERS: Final = 256


class ScanContext(msgspec.Struct, frozen=True, kw_only=True):
    """Facts of one kernel that all its objects are scanned with.

    `paravirt` maps an offset in pv_ops to the member there, such as "cpu.read_msr": those that
    hide a trap or a mapping. `handler` is what its #VE handler can do.
    """

    paravirt: dict[int, str]
    handler: VeHandler


def read_context(vmlinux: "Binary | None") -> ScanContext:
    """Read the context from a vmlinux; without one, modules are judged as upstream's."""
    if vmlinux is None:
        return ScanContext(paravirt={}, handler=VeHandler.derive(lambda _: True))
    types = _types(vmlinux)
    enumerators = next(
        (found for name in _MMIO_ENUMS if types and (found := types.enum(name))), None
    )
    handler = VeHandler.derive(
        lambda name: vmlinux.address_of(name) is not None,
        None if enumerators is None else frozenset(enumerators),
        (lambda name: _names_in_dwarf(vmlinux, name)) if vmlinux.has_dwarf else None,
    )
    return ScanContext(paravirt=_paravirt(vmlinux, types), handler=handler)


def _names_in_dwarf(vmlinux: "Binary", name: str) -> bool:
    return f"\0{name}\0".encode() in bytes(vmlinux.elf.contents(".debug_str"))


def _types(vmlinux: "Binary") -> Btf | None:
    data = vmlinux.elf.contents(".BTF")
    return Btf.parse(data, name=f"{vmlinux.elf.name}: .BTF") if len(data) else None


def _paravirt(vmlinux: "Binary", types: Btf | None) -> dict[int, str]:
    members = None if types is None else types.struct(_PV_STRUCT)
    if types is None or members is None:
        return _paravirt_by_target(vmlinux)
    found = {}
    for outer, (base, type_name) in members.items():
        inner = types.struct(type_name.rpartition(" ")[2]) or {}
        for name, member in inner.items():
            full = f"{outer}.{name}"
            if full in PARAVIRT or full in PARAVIRT_MAPPERS:
                found[base + member.offset] = full
    return found


def _paravirt_by_target(vmlinux: "Binary") -> dict[int, str]:
    """Tell the members by the native functions that pv_ops points to at first."""
    table = vmlinux.address_of(PV_OPS)
    if table is None:
        return {}
    found: dict[int, str] = {}
    for offset in range(0, _MAX_MEMBERS * _POINTER, _POINTER):
        pointer = vmlinux.read(table + offset, _POINTER)
        if pointer is None:
            break
        names = vmlinux.functions.names_at(int.from_bytes(pointer, "little"))
        member = next((_NATIVE[name] for name in names if name in _NATIVE), None)
        if member is not None and member not in found.values():
            found[offset] = member
    return found
