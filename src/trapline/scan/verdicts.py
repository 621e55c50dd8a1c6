"""Whether Linux's #VE handler copes with a site that is not an instruction that traps itself.

A call of an accessor or through pv_ops ends in such an instruction: the verdict is that of the
form the accessor uses on a TDX guest.
"""

from functools import cache
from typing import TYPE_CHECKING, Final

from iced_x86 import Decoder

from trapline.linux import ve_handler

if TYPE_CHECKING:
    from trapline.linux.accessors import Called
    from trapline.linux.ve_handler import Emulation, VeHandler

# One instruction for each class and direction, as the native functions have it.
_SAMPLES: Final = {
    ("mmio", "read"): "8b07",  # mov (%rdi),%eax
    ("mmio", "write"): "893e",  # mov %edi,(%rsi)
    ("pio", "read"): "ed",  # in (%dx),%eax
    ("pio", "write"): "ef",  # out %eax,(%dx)
    ("pio", "read-write"): "ef",
    ("msr", "read"): "0f32",
    ("msr", "write"): "0f30",
    ("msr", "read-write"): "0f30",
    ("cpuid", "read"): "0fa2",
    ("hlt", "execute"): "f4",
    ("wbinvd", "execute"): "0f09",
    ("rdpmc", "read"): "0f33",
    ("cr", "write"): "0f22c0",  # mov %rax,%cr0
}


# Accessors that have another: arch/x86/lib/iomap_copy_64.S, later inline, has no other way in
# a TD, while memcpy_toio() and kin do without string moves there.
_BY_ACCESSOR: Final = {"__iowrite32_copy": "f3a5"}  # rep movsl


def of_call(called: "Called", handler: "VeHandler", accessor: str | None = None) -> "Emulation":
    """Judge a call of an accessor."""
    code = _BY_ACCESSOR.get(accessor or "") or _SAMPLES[called.trap, called.access]
    verdict = _of_code(code, handler)
    return verdict._replace(reason=f"it ends in a trap: {verdict.reason}")


def of_copy(handler: "VeHandler") -> "Emulation":
    """Judge a call of memcpy() or kin on device memory: a string move on today's processors."""
    verdict = ve_handler.emulable_mmio(Decoder(64, bytes.fromhex("f3a4")).decode(), handler)
    return verdict._replace(reason=f"it ends in a string move: {verdict.reason}")


@cache
def _of_code(code: str, handler: "VeHandler") -> "Emulation":
    return ve_handler.emulable(Decoder(64, bytes.fromhex(code)).decode(), handler)
