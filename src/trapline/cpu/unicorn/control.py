"""The pages that steer the core's intercepts: VMCB, I/O and MSR permission maps."""

import ctypes
import mmap
from typing import Final

from trapline.cpu.unicorn.libunicorn import VMCB_EXIT_INFO_2, VMCB_IOPM, VMCB_MSRPM

_IOPM: Final = 0x1000  # 12 KiB
_MSRPM: Final = 0x4000  # 8 KiB
SIZE: Final = 0x6000
_MSRPM_BYTES: Final = 0x2000
# Where each range of MSRs starts in the map, 2 bits each: AMD64 APM vol. 2 section 15.11.
_RANGES: Final = ((0, 0), (0xC0000000, 0x2000), (0xC0010000, 0x4000))
_RANGE_LENGTH: Final = 0x2000


class ControlPages:
    """Pages that the core reads at physical address `base`, outside the guest's reach."""

    def __init__(self, base: int) -> None:
        self._map = mmap.mmap(-1, SIZE)
        self._anchor = (ctypes.c_char * SIZE).from_buffer(self._map)
        self.address = ctypes.addressof(self._anchor)
        self._words = memoryview(self._map).cast("Q")
        self._words[VMCB_IOPM // 8] = base + _IOPM
        self._words[VMCB_MSRPM // 8] = base + _MSRPM
        self._map[_IOPM:SIZE] = b"\xff" * (SIZE - _IOPM)

    @property
    def fault_gpa(self) -> int:
        """GPA of the last nested page fault."""
        return self._words[VMCB_EXIT_INFO_2 // 8]

    def pass_msr(self, index: int, bits: int, *, passes: bool) -> None:
        """Let reads (bit 0) or writes (bit 1) of an MSR through, or stop them.

        MSRs outside the map's ranges always exit.
        """
        for first, slot in _RANGES:
            if first <= index < first + _RANGE_LENGTH:
                bit = (slot + index - first) * 2
                at = _MSRPM + bit // 8
                mask = bits << bit % 8
                self._map[at] = self._map[at] & ~mask | (0 if passes else mask)

    def close(self) -> None:
        """Unmap; the core must be gone."""
        self._words.release()
        del self._anchor
        self._map.close()
