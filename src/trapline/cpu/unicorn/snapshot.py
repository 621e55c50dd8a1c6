"""Freeze, save and restore: the state of one CPU and its memory, in microseconds.

RAM is copy-on-write over a frozen copy, so a restore drops the pages written since. Code
translated from such pages is dropped too.
"""

import ctypes
from typing import Any, Final, NamedTuple

from trapline.cpu.engine import Snapshot
from trapline.cpu.unicorn.core import Core
from trapline.cpu.unicorn.libunicorn import Env
from trapline.cpu.unicorn.memory import SavedMemory, UnicornMemory
from trapline.cpu.unicorn.slots import LOG_ENTRIES, Slot
from trapline.cpu.unicorn.vcpu import UnicornVcpu

_PAGE: Final = 4096
_LOG_ENTRY: Final = 4  # words, see NativeHooks.translated
_KERNEL_HALF: Final = 1 << 63
_CPU_STATE: Final = Env.RESET_END
_SLOTS: Final = Slot.END * 8
_DR7: Final = Env.DR // 8 + 7
_DR7_ENABLED: Final = 0xFF
_NO_BREAKPOINTS: Final = bytes(32)


class SavedState(NamedTuple):
    """One snapshot: the core's state, the slots, and what the VCPU's parts remember."""

    memory: SavedMemory
    cpu: bytes
    slots: bytes
    parts: tuple[Any, ...]


class Snapshots:
    """Takes and restores snapshots, outside `Vcpu.run` or in its handler."""

    def __init__(self, core: Core, memory: UnicornMemory, vcpu: UnicornVcpu) -> None:
        self._core = core
        self._memory = memory
        self._hooks = vcpu.hooks
        self._translate = vcpu.translate
        self._parts = vcpu.stateful

    def freeze(self, *, announced: bool = False) -> SavedState:
        """Make RAM copy-on-write from here and return a snapshot of all state.

        `announced`: the caller promises to tell of each write through `ram` by `code_changed`,
        so that a restore may copy back the pages written rather than look for them. That is
        several times faster.
        """
        self._memory.freeze(announced=announced)
        self._hooks.translated[0] = 0
        return self.save()

    def save(self) -> SavedState:
        """Return the CPU's state; RAM on `restore` is that of the last freeze."""
        cpu = bytearray(ctypes.string_at(self._core.fields.env, _CPU_STATE))
        cpu[Env.HW_BREAKPOINTS : Env.HW_BREAKPOINTS + 32] = _NO_BREAKPOINTS
        return SavedState(
            self._memory.save(),
            bytes(cpu),
            ctypes.string_at(self._hooks.control_address, _SLOTS),
            tuple([part.save() for part in self._parts]),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot: CPU, RAM, second-level tables, time and counters."""
        if not isinstance(snapshot, SavedState):
            raise TypeError("the snapshot is not one of this engine")
        generation = snapshot.memory.generation
        if generation != self._memory.host.generation or not generation:
            raise ValueError("the snapshot belongs to RAM that was frozen anew since")
        stale = self._stale_translations()
        self._memory.load(snapshot.memory)
        for at in stale:
            self._core.drop_code(at, at + _PAGE)
        self._load_cpu(snapshot.cpu)
        ctypes.memmove(self._hooks.control_address, snapshot.slots, _SLOTS)
        for part, saved in zip(self._parts, snapshot.parts, strict=True):
            part.load(saved)

    def _load_cpu(self, cpu: bytes) -> None:
        """Copy the state in; hardware breakpoints are the core's own lists, so via DR7."""
        fields = self._core.fields
        update_dr7 = self._core.library.cpu_x86_update_dr7
        old = fields.env64[_DR7]
        if old & _DR7_ENABLED:
            update_dr7(fields.env, 0)
        ctypes.memmove(fields.env, cpu, _CPU_STATE)
        new = fields.env64[_DR7]
        if new & _DR7_ENABLED:
            fields.env64[_DR7] = 0x400
            update_dr7(fields.env, new)

    def _stale_translations(self) -> set[int]:
        """GPAs of pages with code translated since the last restore from changed bytes."""
        log, ram = self._hooks.translated, self._memory.host
        count, log[0] = log[0], 0
        if count == LOG_ENTRIES:
            self._core.drop_all_code()
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
                    self._core.drop_all_code()
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
        gpa = self._translate((gla | _PAGE - 1) + 1 & (1 << 64) - 1)
        return gpa if gpa is not None and gpa + _PAGE <= self._memory.host.size else None
