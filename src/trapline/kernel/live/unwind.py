"""Back traces of a stopped guest from its registers and its memory.

The walk is that of arch/x86/kernel/unwind_orc.c; what it cannot explain is shown as the kernel
shows it, as guesses marked "?" (show_trace_log_lvl(), arch/x86/kernel/dumpstack.c). A guest's
stack is hostile input: each read may fail, no value is trusted, and the number of frames and of
words looked at is bounded whatever the stack says.
"""

import struct
from collections.abc import Callable
from typing import Final, NamedTuple

from trapline.kernel.live.orc import FRAME_POINTER, NULL_CALL, OrcEntry, OrcReg, OrcType

MAX_FRAMES: Final = 128
MAX_GUESSES: Final = 64
# Task and IRQ stacks are THREAD_SIZE large and aligned (page_64_types.h); exception stacks are
# smaller and end in an unmapped guard page.
STACK_SIZE: Final = 16384

_MASK: Final = (1 << 64) - 1
_WORD: Final = struct.Struct("<Q")
_PAGE: Final = 4096
# struct pt_regs (arch/x86/include/asm/ptrace.h), and the part of it that the CPU pushes.
_PT_REGS: Final = struct.Struct("<21Q")
_IRET_OFFSET: Final = 128
_IRET: Final = struct.Struct("<5Q")
_SAVED: Final = {
    OrcReg.R10: "r10", OrcReg.R13: "r13", OrcReg.DI: "rdi", OrcReg.DX: "rdx", OrcReg.AX: "rax",
}  # fmt: skip

ReadMemory = Callable[[int, int], bytes | None]
FindOrc = Callable[[int], OrcEntry | None]


class SavedRegisters(NamedTuple):
    """struct pt_regs, in its order."""

    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int

    @property
    def from_user(self) -> bool:
        """Whether ring 3 was interrupted; bits above 15 of CS hold other things with FRED."""
        return self.cs & 3 != 0


class StackFrame(NamedTuple):
    """One line of a back trace.

    `slot` is the GLA that holds `address`, None for the frame the registers name. A return
    address is one past its call (`is_call`): look up `address - 1`. `registers` is there when an
    exception or interrupt saved all of them. A guess was merely found on the stack.
    """

    address: int
    sp: int
    slot: int | None
    is_call: bool
    is_guess: bool = False
    is_user: bool = False
    registers: SavedRegisters | None = None


class Backtrace(NamedTuple):
    """Frames from the innermost outwards; `complete` when the walk reached the stack's end."""

    frames: tuple[StackFrame, ...]
    complete: bool


class _LostError(Exception):
    """The stack or the table does not make sense from here on."""


class _Walk:
    """The state of one unwind; see struct unwind_state."""

    def __init__(self, registers: SavedRegisters, read: ReadMemory, find: FindOrc) -> None:
        self.ip = registers.rip
        self.sp = registers.rsp
        self.bp = registers.rbp
        self.saved: SavedRegisters | None = registers
        self.is_user = registers.from_user
        self.signal = True
        self.has_registers = True
        self._read = read
        self._find = find

    def next(self) -> StackFrame | None:
        """Step to the caller; None at the end of the stack."""
        if self.is_user:
            return None
        entry = self._lookup()
        if entry.type == OrcType.END_OF_STACK:
            return None
        before = self.sp
        self.signal = entry.signal
        cfa = self._cfa(entry)
        frame = self._load(entry, cfa)
        self._restore_bp(entry, cfa)
        if before // STACK_SIZE == self.sp // STACK_SIZE and self.sp <= before:
            raise _LostError
        return frame

    def _lookup(self) -> OrcEntry:
        if self.ip == 0:
            return NULL_CALL
        # A return address may already belong to what follows a call that does not return.
        entry = self._find(self.ip if self.signal else self.ip - 1)
        if entry is None:
            return FRAME_POINTER
        if entry.type == OrcType.UNDEFINED:
            raise _LostError
        return entry

    def _cfa(self, entry: OrcEntry) -> int:
        offset = entry.sp_offset
        match entry.sp_reg:
            case OrcReg.SP:
                value = self.sp + offset
            case OrcReg.BP:
                value = self.bp + offset
            case OrcReg.SP_INDIRECT:
                value = self._word(self.sp) + offset
            case OrcReg.BP_INDIRECT:
                value = self._word(self.bp + offset)
            case OrcReg.R10 | OrcReg.R13 | OrcReg.DI | OrcReg.DX | OrcReg.AX:
                value = self._saved_register(entry.sp_reg)
            case _:
                raise _LostError
        return value & _MASK

    def _saved_register(self, register: int) -> int:
        if self.saved is None:
            raise _LostError
        return int(getattr(self.saved, _SAVED[OrcReg(register)]))

    def _load(self, entry: OrcEntry, cfa: int) -> StackFrame:
        match entry.type:
            case OrcType.CALL:
                slot = cfa - 8 & _MASK
                self.ip, self.sp, self.saved = self._word(slot), cfa, None
                self.is_user = self.has_registers = False
                return StackFrame(self.ip, self.sp, slot, is_call=True)
            case OrcType.REGS:
                self.saved = SavedRegisters(*_PT_REGS.unpack(self._bytes(cfa, _PT_REGS.size)))
                self.ip, self.sp = self.saved.rip, self.saved.rsp
                self.is_user, self.has_registers = self.saved.from_user, True
                return self._interrupted(cfa + _IRET_OFFSET, self.saved)
            case OrcType.REGS_PARTIAL:
                # Only what the CPU pushed is there yet; older registers stay as they were.
                self.ip, cs, _, self.sp, _ = _IRET.unpack(self._bytes(cfa, _IRET.size))
                self.is_user, self.has_registers = cs & 3 != 0, True
                return self._interrupted(cfa, None)
            case _:
                raise _LostError

    def _interrupted(self, slot: int, saved: SavedRegisters | None) -> StackFrame:
        return StackFrame(
            self.ip, self.sp, slot, is_call=False, is_user=self.is_user, registers=saved
        )

    def _restore_bp(self, entry: OrcEntry, cfa: int) -> None:
        match entry.bp_reg:
            case OrcReg.UNDEFINED:
                if self.has_registers and self.saved is not None:
                    self.bp = self.saved.rbp
            case OrcReg.PREV_SP:
                self.bp = self._word(cfa + entry.bp_offset)
            case OrcReg.BP:
                self.bp = self._word(self.bp + entry.bp_offset)
            case _:
                raise _LostError

    def _word(self, address: int) -> int:
        value: int = _WORD.unpack(self._bytes(address, _WORD.size))[0]
        return value

    def _bytes(self, address: int, size: int) -> bytes:
        start = address & _MASK
        data = self._read(start, size) if start + size <= _MASK else None
        if data is None or len(data) != size:
            raise _LostError
        return data


def unwind(registers: SavedRegisters, read: ReadMemory, find: FindOrc) -> Backtrace:
    """Walk the stack that `registers` stand on.

    `read(gla, size)` returns guest memory or None; `find(address)` returns the ORC entry of a
    run-time address, None for code without one, which is then assumed to keep a frame pointer.
    """
    walk = _Walk(registers, read, find)
    frames = [
        StackFrame(
            registers.rip,
            registers.rsp,
            None,
            is_call=False,
            is_user=registers.from_user,
            registers=registers,
        )
    ]
    seen = set()
    try:
        while len(frames) < MAX_FRAMES:
            frame = walk.next()
            # Hand-made stacks begin with a return address of 0.
            if frame is None or (frame.is_call and frame.address == 0):
                return Backtrace(tuple(frames), complete=True)
            if frame.slot in seen:
                break  # two stacks that lead to each other
            seen.add(frame.slot)
            frames.append(frame)
    except _LostError:
        pass
    return Backtrace(tuple(frames), complete=False)


def with_guesses(
    trace: Backtrace, read: ReadMemory, is_text: Callable[[int], bool]
) -> tuple[StackFrame, ...]:
    """Add what else on the stack looks like a return address, as the kernel's own traces do.

    Words below a known frame are leftovers of calls that have returned. Where the walk lost its
    way, the rest of the stack is all there is to show.
    """
    result = [trace.frames[0]]
    cursor = trace.frames[0].sp
    budget = MAX_GUESSES
    for frame in trace.frames[1:]:
        slot = frame.slot if frame.slot is not None else cursor
        if cursor // STACK_SIZE == slot // STACK_SIZE:
            guesses = _scan(cursor, slot, read, is_text)[:budget]
            budget -= len(guesses)
            result += guesses
        result.append(frame)
        cursor = slot + 8 if frame.is_call else frame.sp
    if not trace.complete:
        result += _scan(cursor, (cursor // STACK_SIZE + 1) * STACK_SIZE, read, is_text)[:budget]
    return tuple(result)


def _scan(
    start: int, end: int, read: ReadMemory, is_text: Callable[[int], bool]
) -> list[StackFrame]:
    """List the text addresses in [start, end), which is less than a stack, page by page."""
    found = []
    position = (start + 7) & ~7
    while position < end:
        stop = min(end & ~7, (position // _PAGE + 1) * _PAGE)
        data = read(position, stop - position) if stop > position else None
        if data is None or len(data) != stop - position:
            break
        for index, (word,) in enumerate(_WORD.iter_unpack(data)):
            if is_text(word):
                slot = position + 8 * index
                found.append(StackFrame(word, slot + 8, slot, is_call=True, is_guess=True))
        position = stop
    return found
