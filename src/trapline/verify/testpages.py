"""A window of our own in a guest's address space: code, operand and stack pages.

The guest's page tables get a few entries where they have none. The pages themselves, and the
tables for them, are in the hole of the PC memory map between 640 KiB and the ACPI tables: RAM
of this machine that its memory map does not offer to the guest.
"""

from typing import Final

from trapline.base.errors import BadMachineError
from trapline.cpu.engine import Vcpu

PAGE: Final = 4096
_HOLE: Final = range(0xA0000, 0xE0000)

PRESENT: Final = 1
WRITABLE: Final = 2
USER: Final = 4
_ACCESSED: Final = 0x20
_DIRTY: Final = 0x40
_LARGE: Final = 0x80
NO_EXECUTE: Final = 1 << 63
DATA: Final = PRESENT | WRITABLE | _ACCESSED | _DIRTY | NO_EXECUTE
CODE: Final = PRESENT | _ACCESSED
_TABLE: Final = PRESENT | WRITABLE | USER | _ACCESSED
_FRAME: Final = 0xFFFFFFFFFF000

# In the top 2 GiB, so that an absolute 32-bit displacement reaches it, and between the modules
# and the fixmap (Documentation/arch/x86/x86_64/mm.rst).
KERNEL_BASE: Final = 0xFFFF_FFFF_FD00_0000
# Where a process has nothing unless it asks for it.
USER_BASE: Final = 0x1000_0000

USER_HALF_END: Final = 1 << 47

CODE_AT: Final = 0x0000
OPERAND_AT: Final = 0x1000
OPERAND_SIZE: Final = 2 * PAGE
STACK_AT: Final = 0x4000  # an unmapped page below catches overflows
STACK_SIZE: Final = 4 * PAGE
# Where operands are: not at the start of the page, a multiple of 16.
OPERAND: Final = KERNEL_BASE + OPERAND_AT + 0xF0
OPERAND_BELOW_4G: Final = USER_BASE + OPERAND_AT + 0xF0
# The instruction under test ends here, so that one breakpoint serves all.
END: Final = KERNEL_BASE + CODE_AT + 0x800
USER_END: Final = USER_BASE + CODE_AT + 0x800

CODE_GPA: Final = 0xA0000
OPERAND_GPA: Final = 0xA1000
STACK_GPA: Final = 0xA4000
_TABLES_GPA: Final = 0xB0000

# No RAM is here (at most 3 GiB), and no device.
MMIO_GPA: Final = 0xD000_0000


class Window:
    """The pages in the address space that CR3 has at construction.

    Nothing is written before `enter`; `leave` takes it back. With `user`, the pages are ring 3's;
    else they are the kernel's, once in its half of the address space and once below 4 GiB.
    """

    def __init__(self, vcpu: Vcpu, *, user: bool) -> None:
        self._vcpu = vcpu
        self._words = vcpu.memory.ram.cast("Q")
        self._root = vcpu.cr(3) & _FRAME
        self._free = _TABLES_GPA
        self._writes: dict[int, int] = {}  # index of a page table entry -> its value
        self._operand: list[tuple[int, int, int]] = []  # entry, page number, flags
        if any(vcpu.memory.ram[_HOLE.start : _HOLE.stop]):
            raise BadMachineError("the hole below 1 MiB is in use in this guest.")
        self._map(USER_BASE, USER)
        if not user:
            self._map(KERNEL_BASE, 0)
        self._operand_tables = sorted({index * 8 & -PAGE for index, _, _ in self._operand})

    def enter(self) -> None:
        """Write the page tables; all pages are plain memory."""
        words = self._words
        for index, value in self._writes.items():
            words[index] = value
        self.aim((False, False))

    def aim(self, mmio: tuple[bool, ...]) -> None:
        """Make those operand pages MMIO; the TLB is the caller's concern."""
        words = self._words
        shared = MMIO_GPA | self._vcpu.memory.shared_bit
        for index, page, flags in self._operand:
            start = shared if mmio[page] else OPERAND_GPA
            words[index] = start + page * PAGE | flags
        for gpa in self._operand_tables:
            self._vcpu.memory.code_changed(gpa, PAGE)

    def leave(self) -> None:
        """Let the guest have its page tables back."""
        for index in (*self._writes, *(index for index, _, _ in self._operand)):
            self._words[index] = 0

    def _map(self, base: int, user: int) -> None:
        self._writes[self._entry(base + CODE_AT)] = CODE_GPA | CODE | user
        for page in range(OPERAND_SIZE // PAGE):
            self._operand.append((self._entry(base + OPERAND_AT + page * PAGE), page, DATA | user))
        for at in range(0, STACK_SIZE, PAGE):
            self._writes[self._entry(base + STACK_AT + at)] = STACK_GPA + at | DATA | user

    def _entry(self, gla: int) -> int:
        """Return the index of a page's entry; tables above it are added where there are none."""
        table = self._root
        for shift in (39, 30, 21):
            index = self._index(table, gla, shift)
            entry = self._writes.get(index, self._words[index])
            if not entry & PRESENT:
                entry = self._writes[index] = self._free | _TABLE
                self._free += PAGE
            elif entry & _LARGE:
                raise self._taken(gla)
            table = entry & _FRAME & ~self._vcpu.memory.shared_bit
        index = self._index(table, gla, 12)
        if self._words[index] & PRESENT:
            raise self._taken(gla)
        return index

    def _index(self, table: int, gla: int, shift: int) -> int:
        index = (table >> 3) + (gla >> shift & 0x1FF)
        if index >= len(self._words):
            raise BadMachineError(f"the guest's page tables are outside its memory, at {table:#x}.")
        return index

    @staticmethod
    def _taken(gla: int) -> BadMachineError:
        return BadMachineError(
            f"the guest has mapped {gla:#x} already: there is no room for the tests."
        )
