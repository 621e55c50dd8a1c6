"""Which values WRMSR takes: the others are #GP(0), whoever keeps the MSR.

Source: SDM volume 4, chapter 2; volume 3A, sections 4.12 (memory types of the PAT) and 5.8.7;
volume 1, 3.3.7.1 (canonical addresses).
"""

from typing import Final

# SYSENTER_ESP, SYSENTER_EIP, DS_AREA, LSTAR, CSTAR; FS, GS and kernel GS base.
_ADDRESSES: Final = frozenset(
    (0x175, 0x176, 0x600, 0xC000_0082, 0xC000_0083, 0xC000_0100, 0xC000_0101, 0xC000_0102)
)
_PAT: Final = 0x277
_MEMORY_TYPES: Final = frozenset((0, 1, 4, 5, 6, 7))  # UC WC WT WP WB UC-
_HALVES: Final = frozenset((0xC000_0084, 0xC000_0103))  # FMASK, TSC_AUX: bits 63:32 reserved
_ADDRESS_BITS: Final = 48  # without LA57

CHECKED: Final = _ADDRESSES | _HALVES | {_PAT}


def is_canonical(address: int) -> bool:
    """Say whether bits 63:47 of a linear address are all the same."""
    return (address >> _ADDRESS_BITS - 1) + 1 & (1 << 65 - _ADDRESS_BITS) - 1 in {0, 1}


def is_taken(index: int, value: int) -> bool:
    """Say whether the processor takes the value; true of MSRs that are not in `CHECKED`."""
    if index in _ADDRESSES:
        return is_canonical(value)
    if index in _HALVES:
        return not value >> 32
    if index == _PAT:
        return all(kind in _MEMORY_TYPES for kind in value.to_bytes(8, "little"))
    return True
