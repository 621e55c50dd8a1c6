"""Freeze, save and restore: the state of one CPU and its RAM, in microseconds.

RAM is copy-on-write over a frozen copy, so a restore drops the pages written since. Code
translated from such pages is dropped too.
"""

import ctypes
from typing import Any, Final, NamedTuple

from trapline.cpu.engine import Snapshot
from trapline.cpu.unicorn.exits import Exits
from trapline.cpu.unicorn.layout import Env
from trapline.cpu.unicorn.slots import LOG_ENTRIES, Slot

_PAGE: Final = 4096
_LOG_ENTRY: Final = 4  # words, see NativeHooks.translated
_KERNEL_HALF: Final = 1 << 63
_CPU_STATE: Final = Env.RESET_END
_CONTROL: Final = Slot.END * 8
_DR7: Final = Env.DR // 8 + 7
_DR7_ENABLED: Final = 0xFF
_NO_BREAKPOINTS: Final = bytes(32)

# Attributes of the engine that are part of its state.
_ATTRIBUTES: Final = (
    "_base_cycles",
    "_budget",
    "_cr_write",
    "_ept",
    "_fault",
    "_interrupted",
    "_kicked",
    "_nmi_blocked",
    "_nmi_window",
    "_noise",
    "_random",
    "_trapped",
    "_triple_fault",
    "_vectoring",
)


class SavedState(NamedTuple):
    """One snapshot. `generation` is the freeze whose RAM it belongs to."""

    generation: int
    cpu: bytes
    control: bytes
    attributes: dict[str, Any]
    other_msrs: dict[int, int]
    nested: tuple[int, int, bytes]


class Snapshots(Exits):
    """Snapshots of the engine; taken and restored outside `run`, or in its handler."""

    _stale_tlb: bool
    _announced = False

    def freeze(self, *, announced: bool = False) -> SavedState:
        """Make RAM copy-on-write from here and return a snapshot of all state.

        Snapshots of an earlier freeze can no longer be restored. `announced`: the caller
        promises to tell of each write through `ram` by `code_changed`, so that a restore may
        copy back the pages written rather than look for them. That is several times faster.
        """
        self._ram.freeze()
        self._announced = announced
        self._write_log.clear()
        self._stale_tlb = True
        self._hooks.translated[0] = 0
        return self.save()

    def save(self) -> SavedState:
        """Return the CPU's state; RAM on `restore` is that of the last freeze."""
        cpu = bytearray(ctypes.string_at(self._fields.env, _CPU_STATE))
        cpu[Env.HW_BREAKPOINTS : Env.HW_BREAKPOINTS + 32] = _NO_BREAKPOINTS
        return SavedState(
            self._ram.generation,
            bytes(cpu),
            ctypes.string_at(self._hooks.control_address, _CONTROL),
            {name: getattr(self, name) for name in _ATTRIBUTES},
            dict(self._other_msrs),
            self._nested.save(),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot: CPU, RAM, second-level tables, time and counters."""
        if not isinstance(snapshot, SavedState):
            raise TypeError("the snapshot is not one of this engine")
        if snapshot.generation != self._ram.generation or not snapshot.generation:
            raise ValueError("the snapshot belongs to RAM that was frozen anew since")
        stale = self._stale_translations()
        self._restore_ram()
        self._nested.load(snapshot.nested)
        for at in stale:
            self._library.tb_invalidate_phys_range(self._fields.uc, at, at + _PAGE)
        self._load_cpu(snapshot.cpu)
        ctypes.memmove(self._hooks.control_address, snapshot.control, _CONTROL)
        vars(self).update(snapshot.attributes)
        self._other_msrs = dict(snapshot.other_msrs)
        self._stale_tlb = True

    def _restore_ram(self) -> None:
        if self._announced and self._write_log.is_complete:
            self._write_log.copy_back(self._ram.address, self._ram.frozen_address)
        else:
            self._ram.restore()
            self._write_log.clear()

    def _load_cpu(self, cpu: bytes) -> None:
        """Copy the state in; hardware breakpoints are the core's own lists, so via DR7."""
        old = self._env64[_DR7]
        if old & _DR7_ENABLED:
            self._library.cpu_x86_update_dr7(self._fields.env, 0)
        ctypes.memmove(self._fields.env, cpu, _CPU_STATE)
        new = self._env64[_DR7]
        if new & _DR7_ENABLED:
            self._env64[_DR7] = 0x400
            self._library.cpu_x86_update_dr7(self._fields.env, new)

    def _stale_translations(self) -> set[int]:
        """GPAs of pages with code translated since the last restore from changed bytes."""
        log, ram = self._hooks.translated, self._ram
        count, log[0] = log[0], 0
        if count == LOG_ENTRIES:
            self._library.tb_flush(self._fields.cpu)
            return set()
        stale = set()
        for entry in range(_LOG_ENTRY, _LOG_ENTRY * (count + 1), _LOG_ENTRY):
            host, size, gla = log[entry : entry + 3]
            at = host - ram.address
            if not 0 <= at < ram.size:
                continue
            parts = [(at, min(size, _PAGE - at % _PAGE))]
            if parts[0][1] < size:
                second = self._second_page(gla)
                if second is None:
                    self._library.tb_flush(self._fields.cpu)
                    return set()
                parts.append((second, size - parts[0][1]))
            if any(ram.differs_from_frozen(ram.address + part, length) for part, length in parts):
                stale.add(at - at % _PAGE)
        return stale

    def _second_page(self, gla: int) -> int | None:
        """GPA of the page behind the one a block of code starts in; None if it may be anywhere.

        The kernel's code is in the same place whatever page tables are loaded by now.
        """
        if not gla & _KERNEL_HALF:
            return None
        gpa = self.translate((gla | _PAGE - 1) + 1 & (1 << 64) - 1)
        return gpa if gpa is not None and gpa + _PAGE <= self._ram.size else None
