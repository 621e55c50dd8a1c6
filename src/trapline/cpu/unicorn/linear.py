"""Linear addresses: walks of the guest's page tables, without side effects."""

from typing import Final

from trapline.cpu.unicorn.core import Core
from trapline.cpu.unicorn.libunicorn import Env, HFlags
from trapline.cpu.unicorn.memory import UnicornMemory
from trapline.cpu.unicorn.registerfile import CR0_PG, CR4_PAE, CR4_PSE, RegisterFile

_PAGE: Final = 4096
_ADDRESS = 0xFFFFFFFFFF000  # bits 51:12 of a page table entry


class LinearMemory:
    """Memory as the code that executes sees it."""

    def __init__(self, core: Core, registers: RegisterFile, memory: UnicornMemory) -> None:
        self._env32 = core.fields.env32
        self._cr = registers.cr
        self._memory = memory
        self._offset = memory.offset
        self._whole = memory.host.whole
        self._words = memory.host.words

    def translate(self, gla: int) -> int | None:
        """Return the GPA behind a linear address, or None if no page table maps it.

        The shared bit is kept. Permissions are not looked at, accessed and dirty bits not
        set.
        """
        if not self._cr(0) & CR0_PG:
            return gla & 0xFFFFFFFF
        if self._env32[Env.HFLAGS // 4] & HFlags.LMA:
            return self._walk(gla, (39, 30, 21, 12), self._cr(3) & _ADDRESS)
        if self._cr(4) & CR4_PAE:
            return self._walk(gla & 0xFFFFFFFF, (30, 21, 12), self._cr(3) & 0xFFFFFFE0)
        return self._walk_legacy(gla & 0xFFFFFFFF)

    def read(self, gla: int, size: int) -> bytes | None:
        """Read linear memory; None if any of it is not mapped to RAM."""
        parts = []
        while size > 0:
            chunk = min(size, _PAGE - gla % _PAGE)
            at = self._ram_offset(gla, chunk)
            if at is None:
                return None
            parts.append(bytes(self._whole[at : at + chunk]))
            gla, size = gla + chunk, size - chunk
        return b"".join(parts)

    def write(self, gla: int, data: bytes) -> bool:
        """Write linear memory, code included; False (and nothing written) if not mapped."""
        places: list[tuple[int, bytes]] = []
        while data:
            chunk = min(len(data), _PAGE - gla % _PAGE)
            at = self._ram_offset(gla, chunk)
            if at is None:
                return False
            places.append((at, data[:chunk]))
            gla, data = gla + chunk, data[chunk:]
        for at, part in places:
            self._whole[at : at + len(part)] = part
            self._memory.code_changed(at, len(part))
        return True

    def _ram_offset(self, gla: int, size: int) -> int | None:
        """Where in `Ram.whole` the bytes are, all of which are on one page."""
        gpa = self.translate(gla)
        return None if gpa is None else self._offset(gpa, size)

    def _entry(self, gpa: int) -> int:
        """One page table entry; 0 (not present) where no RAM is."""
        at = self._offset(gpa, 8)
        return 0 if at is None else self._words[at >> 3]

    def _walk(self, gla: int, shifts: tuple[int, ...], table: int) -> int | None:
        if shifts[0] == 39 and gla >> 47 not in {0, 0x1FFFF}:
            return None
        for shift in shifts:
            index = gla >> shift & (0x1FF if shift != 30 or len(shifts) == 4 else 3)
            entry = self._entry(table + index * 8)
            if not entry & 1:
                return None
            if shift == 12 or (entry & 0x80 and shift < 39):
                mask = (1 << shift) - 1
                return entry & _ADDRESS & ~mask | gla & mask
            table = entry & _ADDRESS
        return None

    def _walk_legacy(self, gla: int) -> int | None:
        def entry(gpa: int) -> int:
            return self._entry(gpa & ~7) >> (gpa & 4) * 8 & 0xFFFFFFFF

        directory = entry((self._cr(3) & 0xFFFFF000) + (gla >> 22) * 4)
        if not directory & 1:
            return None
        if directory & 0x80 and self._cr(4) & CR4_PSE:
            return directory & 0xFFC00000 | (directory & 0x1FE000) << 19 | gla & 0x3FFFFF
        table = entry((directory & 0xFFFFF000) + (gla >> 12 & 0x3FF) * 4)
        return table & 0xFFFFF000 | gla & 0xFFF if table & 1 else None
