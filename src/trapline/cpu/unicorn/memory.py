"""Guest memory: RAM with its frozen copy, second-level tables, and what was written.

See `trapline.cpu.engine.Memory`.
"""

from typing import NamedTuple

from trapline.cpu.engine import PageState
from trapline.cpu.unicorn.core import Core
from trapline.cpu.unicorn.nested import NestedTables
from trapline.cpu.unicorn.ram import Ram
from trapline.cpu.unicorn.tlb import CodeMap
from trapline.cpu.unicorn.writelog import WriteLog


class SavedMemory(NamedTuple):
    """The second-level tables; `generation` is the freeze whose RAM they belong to."""

    generation: int
    nested: tuple[int, int, bytes]


class UnicornMemory:
    """The memory that `core` sees: `host` is RAM as the host has it, `tables` map it.

    `written` and `code_map` are kept by the native TLB fill. `shared_bit` is 1 << (GPAW - 1).
    """

    def __init__(self, core: Core, host: Ram, tables: NestedTables, shared_bit: int) -> None:
        self._core = core
        self.host = host
        self.tables = tables
        self.code_map = CodeMap(host.span)
        self.written = WriteLog(host.span)
        self.ram = host.view
        self.shared_ram = host.shared
        self.shared_bit = shared_bit
        self._announced = False

    @property
    def shared_fd(self) -> int:
        """The memfd behind `shared_ram`; pages that are not mapped are holes in it."""
        return self.host.shared_fd

    def set_private(self, gpa: int, size: int, state: PageState) -> None:
        """Map or unmap whole pages of RAM in the private half."""
        self.tables.set_private(gpa, size, state)
        self._core.stale_tlb = True

    def set_shared(self, gpa: int, size: int, state: PageState) -> None:
        """Map or unmap whole pages of RAM in the shared half."""
        self.tables.set_shared(gpa, size, state)
        self._core.stale_tlb = True
        if self.host.shared_offset and state is PageState.ABSENT:
            self.host.discard_shared(gpa & ~self.shared_bit, size)

    def code_changed(self, gpa: int, size: int) -> None:
        """Take note that the host wrote to RAM, at `gpa` without shared bit."""
        self.written.add(gpa, size)
        self._core.drop_code(gpa, gpa + size)

    def written_pages(self) -> list[int]:
        """Return the GPAs of pages written since the last freeze or restore.

        Pages that the guest could write are listed, and what was announced by `code_changed`.
        Where that is not all of them, what the host's kernel says: more than was written since,
        as a page once copied stays so.
        """
        pages = self.written.pages()
        return self.host.copied_pages() if pages is None else pages

    def digest(self) -> str:
        """BLAKE2b-128 of the private half of RAM, in hexadecimal."""
        return self.host.digest()

    def offset(self, gpa: int, size: int) -> int | None:
        """Where in `Ram.whole` the bytes at a GPA are, all on one page; None: not in RAM."""
        at = gpa & ~self.shared_bit
        if at + size > self.host.size:
            return None
        return at + self.host.shared_offset if gpa & self.shared_bit else at

    # Snapshots.

    def freeze(self, *, announced: bool) -> None:
        """Make RAM copy-on-write; what was saved before can no longer be loaded."""
        self.host.freeze()
        self._announced = announced
        self.written.clear()
        self._core.stale_tlb = True

    def save(self) -> SavedMemory:
        """Return all state but RAM, which is that of the last freeze."""
        return SavedMemory(self.host.generation, self.tables.save())

    def load(self, saved: SavedMemory) -> None:
        """Return to a saved state, with the frozen RAM."""
        if self._announced and self.written.is_complete:
            self.written.copy_back(self.host.address, self.host.frozen_address)
        else:
            self.host.restore()
            self.written.clear()
        self.tables.load(saved.nested)
        self._core.stale_tlb = True

    def close(self) -> None:
        """Unmap; the core must be gone."""
        self.ram = self.shared_ram = memoryview(b"")
        self.code_map.close()
        self.written.close()
        self.tables.close()
        self.host.close()
