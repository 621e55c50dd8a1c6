"""Where the processor enters a kernel, by what the kernel itself writes down.

Gates are rows of `struct idt_data` in initialised data (arch/x86/include/asm/desc_defs.h, the same
since v4.14, 64e7b8c9f54a): vector, segment, `struct idt_bits` (IST number, type, DPL, present), the
address of the stub. They are told by what they hold, so no name of a table is needed. SYSCALL,
SYSENTER and FRED go where code writes addresses to, and that code is found by the MSRs' numbers.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from trapline.kernel.elf.file import SHT_PROGBITS
from trapline.linux import names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.kernel.binary import Binary

_ROW: Final = 3  # words of eight bytes
_KERNEL_CS: Final = 0x10
_IST: Final = 0x7
_DPL_SHIFT: Final = 13
# What the second word of a row has beside IST and DPL: present, an interrupt gate.
_GATE: Final = np.uint64(0x8E00)
_GATE_BITS: Final = np.uint64(0xFFFF_FFFF_FFFF_FFFF ^ _IST ^ 3 << _DPL_SHIFT)
_VECTORS: Final = 256

MSR_SYSENTER_EIP: Final = 0x176
MSR_LSTAR: Final = 0xC000_0082
MSR_CSTAR: Final = 0xC000_0083
MSR_FRED_CONFIG: Final = 0x1D4
ENTRY_MSRS: Final = (MSR_LSTAR, MSR_CSTAR, MSR_SYSENTER_EIP, MSR_FRED_CONFIG)
_MASK32: Final = 0xFFFF_FFFF
_LOADS: Final = (b"\xb9", b"\xbf")  # MOV ECX, imm32; MOV EDI, imm32
_LONGEST: Final = 1 << 16  # bytes of a function that sets up a processor


class Gate(NamedTuple):
    """One gate; `ist` is the number of its stack in the TSS, 0 for none."""

    vector: int
    ist: int
    dpl: int
    address: int


def gates(binary: "Binary") -> tuple[Gate, ...]:
    """Find all gates that initialised data describes, by vector, then address."""
    found: set[Gate] = set()
    for section in binary.elf.sections:
        if not section.is_alloc or section.is_executable or section.type != SHT_PROGBITS:
            continue
        data = binary.elf.contents(section)
        words = np.frombuffer(data[: len(data) // 8 * 8], "<u8")
        if len(words) < _ROW:
            continue
        first, second, third = words[:-2], words[1:-1], words[2:]
        rows = (first >> np.uint64(32) == _KERNEL_CS) & ((second & _GATE_BITS) == _GATE)
        rows &= (first & np.uint64(_MASK32)) < _VECTORS
        for index in np.flatnonzero(rows).tolist():
            address = int(third[index])
            if binary.text_at(address) is not None:
                bits = int(second[index])
                vector = int(first[index]) & _MASK32
                found.add(Gate(vector, bits & _IST, bits >> _DPL_SHIFT & 3, address))
    return tuple(sorted(found))


def functions_with_entry_msrs(binary: "Binary") -> "Iterator[range]":
    """Give the functions that load the number of such an MSR into ECX or EDI."""
    numbers = (MSR_LSTAR, MSR_FRED_CONFIG)
    patterns = [load + n.to_bytes(4, "little") for n in numbers for load in _LOADS]
    seen = set()
    for section in binary.text:
        data = bytes(section.data)
        for pattern in patterns:
            place = data.find(pattern)
            while place >= 0:
                symbol = binary.symbol_at(section.address + place)
                if symbol is not None and symbol.address not in seen and symbol.size <= _LONGEST:
                    seen.add(symbol.address)
                    yield range(symbol.address, symbol.address + symbol.size)
                place = data.find(pattern, place + 1)


def stub_arrays(binary: "Binary") -> dict[str, int]:
    """Find the arrays of stubs from which the kernel makes gates in a loop."""
    found = ((name, binary.address_of(name)) for name in names.STUB_ARRAYS)
    return {name: address for name, address in found if address is not None}
