"""MSI-X tables as the guest sees them, and as QEMU must.

The guest writes the address and data of a message for its local APIC. A message that QEMU
sends there would vanish in QEMU's own APIC, so its entry gets the doorbell's address and a
slot number instead, and the guest reads back what it wrote. The mask bit goes through.
"""

from dataclasses import dataclass, field
from typing import Final

from trapline.machine.qemu.doorbell import VECTORS, Doorbell
from trapline.machine.qemu.pci import Function
from trapline.machine.qemu.qtest import Qtest

ENTRY: Final = 16
ADDRESS_LOW: Final = 0
ADDRESS_HIGH: Final = 4
DATA: Final = 8
CONTROL: Final = 12
MASKED: Final = 1


@dataclass(slots=True)
class MsixTable:
    """One function's table: `words` is the guest's view, four u32 an entry."""

    function: Function
    words: list[int]
    slots: dict[int, int] = field(default_factory=dict)  # entry -> doorbell slot

    @classmethod
    def of(cls, function: Function) -> "MsixTable | None":
        """Make the table of a function, all entries masked; None if it has no MSI-X."""
        if function.msix is None:
            return None
        return cls(function, [0, 0, 0, MASKED] * function.msix.entries)


@dataclass(frozen=True, slots=True)
class Message:
    """What the guest wants written where when the interrupt comes."""

    address: int
    data: int


class MsixShadow:
    """All tables of the machine. `base_of(table)` is where the guest has mapped it now."""

    def __init__(
        self, qtest: Qtest, doorbell_address: int, functions: tuple[Function, ...]
    ) -> None:
        self._qtest = qtest
        self._doorbell = doorbell_address
        self.tables = tuple(t for f in functions if (t := MsixTable.of(f)) is not None)
        self._owners: list[tuple[MsixTable, int]] = []  # by slot

    def read(self, table: MsixTable, offset: int, size: int) -> int:
        """Read from a table at a byte offset; `size` is 4 or 8, aligned."""
        words = table.words[offset // 4 : (offset + size + 3) // 4]
        value = sum(word << 32 * index for index, word in enumerate(words))
        return value >> 8 * (offset % 4) & (1 << 8 * size) - 1

    def write(self, table: MsixTable, base: int, offset: int, size: int, value: int) -> None:
        """Write to a table at a byte offset, and update QEMU's entry at `base`."""
        if offset % 4 or size not in {4, 8}:
            return  # the specification leaves other accesses undefined
        for index in range(size // 4):
            word = offset // 4 + index
            if word < len(table.words):
                table.words[word] = value >> 32 * index & 0xFFFF_FFFF
                self._program(table, base, word // 4, word % 4 * 4)

    def _program(self, table: MsixTable, base: int, entry: int, register: int) -> None:
        at = base + entry * ENTRY
        if register == CONTROL:
            control = table.words[entry * 4 + 3]
            # Linux masks all entries of a table before it uses some: those need no slot.
            idle = control & MASKED and entry not in table.slots
            slot = None if idle else self._slot(table, entry)
            if slot is None:
                control |= MASKED
            else:
                self._qtest.write_memory(at + ADDRESS_LOW, 4, self._doorbell)
                self._qtest.write_memory(at + ADDRESS_HIGH, 4, 0)
                self._qtest.write_memory(at + DATA, 4, Doorbell.message(slot))
            self._qtest.write_memory(at + CONTROL, 4, control)

    def _slot(self, table: MsixTable, entry: int) -> int | None:
        """Give the doorbell slot of an entry; None when all are taken."""
        if entry not in table.slots:
            if len(self._owners) >= VECTORS:
                return None
            table.slots[entry] = len(self._owners)
            self._owners.append((table, entry))
        return table.slots[entry]

    def message(self, slot: int) -> Message | None:
        """Give the message behind a rung slot; None for a slot that nobody has."""
        if slot >= len(self._owners):
            return None
        table, entry = self._owners[slot]
        low, high, data, _ = table.words[entry * 4 : entry * 4 + 4]
        return Message(high << 32 | low, data)
