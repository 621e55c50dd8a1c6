"""Events into the guest: exceptions, interrupts, NMIs, and what holds them back.

Delivery itself is native (`native`); this module decides what is delivered, keeps NMI
blocking, which the core forgets on direct delivery, and opens windows.
"""

from threading import get_ident
from typing import Final

from trapline.cpu.unicorn.layout import Env, HFlags, Request, Svm
from trapline.cpu.unicorn.native import NativeHooks
from trapline.cpu.unicorn.pagewalk import GuestMemory
from trapline.cpu.unicorn.slots import Delivery, Slot
from trapline.cpu.unicorn.state import RFLAGS_RF, RFLAGS_TF

DE, DB, BP, OF, UD, DF, TS, NP, SS, GP, PF, VE = 0, 1, 3, 4, 6, 8, 10, 11, 12, 13, 14, 20
NMI: Final = 2

# Vectors whose nesting makes a double fault: SDM vol. 3A section 6.15, table 6-5. #VE counts
# as a page fault (section 26.5.7.2 by way of table 6-5's footnote).
_CONTRIBUTORY: Final = frozenset({DE, TS, NP, SS, GP})
_PAGE_FAULTS: Final = frozenset({PF, VE})
_NONE: Final = 0xFFFFFFFF  # old_exception of nothing: -1
_DR6_BS: Final = 1 << 14
_OLD_OF: Final = {vector: vector for vector in (*_CONTRIBUTORY, DF, PF)} | {VE: PF}

# Looked up once here rather than at each exit.
_HFLAGS, _EFLAGS, _DR6 = Env.HFLAGS // 4, Env.EFLAGS // 4, Env.DR // 8 + 6
_CS64, _INHIBIT_IRQ = HFlags.CS64, HFlags.INHIBIT_IRQ
_RF_TF: Final = RFLAGS_RF | RFLAGS_TF
_MASK64: Final = (1 << 64) - 1
_EXCEPTION: Final = Delivery.EXCEPTION
_COUNT, _KIND, _VECTOR, _ERROR = Slot.COUNT, Slot.KIND, Slot.VECTOR, Slot.ERROR
_NEXT_RIP, _OLD = Slot.NEXT_RIP, Slot.OLD
_IRET_BIT: Final = 1 << (Svm.IRET - Svm.INTR)


def _make_double_fault(first: int, second: int) -> bool:
    if second in _CONTRIBUTORY:
        return first in _CONTRIBUTORY or first in _PAGE_FAULTS
    return first in _PAGE_FAULTS and second in _PAGE_FAULTS


class Events(GuestMemory):
    """The event half of the engine."""

    _hooks: NativeHooks
    _slots: memoryview

    def _init_events(self) -> None:
        self._slots = self._hooks.slots
        self._nmi_blocked = False
        self._nmi_window = False
        self._kicked = False
        self._thread = get_ident()
        self._vectoring: int | None = None
        self._interrupted = Delivery.NONE
        self._triple_fault = False
        self._trapped: frozenset[int] = frozenset()
        self.intercept_exceptions(frozenset())

    @property
    def vectoring(self) -> int | None:
        """Vector of the event whose delivery ended in the exit at hand, if any."""
        return self._vectoring

    def deliver(self, vector: int, error_code: int | None = None) -> None:
        """Deliver an exception at RIP, as a fault, before the next instruction.

        Whether the error code is pushed follows from the vector. If an event was being
        delivered at the exit, the two are combined as the processor does.
        """
        code = error_code or 0
        first = self._vectoring
        if first is not None:
            self._vectoring = None
            if first == DF and (vector in _CONTRIBUTORY or vector in _PAGE_FAULTS):
                self._triple_fault = True
                return
            if _make_double_fault(first, vector):
                vector, code = DF, 0
        self._queue(Delivery.EXCEPTION, vector, code)

    def deliver_interrupt(self, vector: int) -> None:
        """Deliver an external interrupt at RIP; IF is the caller's concern."""
        self._queue(Delivery.INTERRUPT, vector, 0)

    def deliver_nmi(self) -> None:
        """Deliver an NMI at RIP and block further ones until an IRET has begun."""
        self._block_nmi(True)
        self._queue(Delivery.INTERRUPT, NMI, 0)

    @property
    def nmi_blocked(self) -> bool:
        """An NMI was delivered and no IRET executed since (SDM vol. 3A section 6.7.1)."""
        return self._nmi_blocked

    def request_interrupt_window(self, wanted: bool) -> None:
        """Exit with INTERRUPT_WINDOW before the next instruction with IF set and no shadow."""
        slots = self._slots
        if wanted:
            slots[Slot.WANTED] |= Request.VIRQ
        else:
            slots[Slot.WANTED] &= ~Request.VIRQ

    def request_nmi_window(self, wanted: bool) -> None:
        """Exit with NMI_WINDOW before the next instruction at which an NMI may be delivered."""
        self._nmi_window = wanted
        if wanted and not self._nmi_blocked:
            self.request_boundary()

    def request_boundary(self) -> None:
        """Exit with BOUNDARY before the next instruction, whatever IF and shadows say.

        From another thread: at the next block of guest code.
        """
        self._kicked = True  # first: whoever sets the limit looks at this afterwards
        self._slots[Slot.LIMIT] = 0
        if get_ident() == self._thread:
            self._slots[Slot.WANTED] |= Request.HARD

    def advance(self, length: int) -> None:
        """Complete an emulated instruction: step RIP, end shadows, trap if TF is set."""
        words, regs = self._env32, self.regs
        flags = words[_HFLAGS]
        regs[16] = regs[16] + length & (_MASK64 if flags & _CS64 else 0xFFFFFFFF)
        if flags & _INHIBIT_IRQ:
            words[_HFLAGS] = flags & ~_INHIBIT_IRQ
        eflags = words[_EFLAGS]
        if eflags & _RF_TF:
            words[_EFLAGS] = eflags & ~RFLAGS_RF
            if eflags & RFLAGS_TF:
                self._env64[_DR6] |= _DR6_BS
                self._queue(Delivery.EXCEPTION, DB, 0)
        self._slots[_COUNT] += 1

    def intercept_exceptions(self, vectors: frozenset[int]) -> None:
        """Choose the exceptions that exit with EXCEPTION before they are delivered."""
        mask = sum(1 << vector for vector in vectors)
        self._slots[Slot.TRAPPED] = mask
        # #UD always exits: TDCALL and RDRAND are found there.
        self._env32[Env.INTERCEPT_EXCEPTIONS // 4] = mask | 1 << 6
        self._trapped = vectors

    def delivered_exceptions(self) -> dict[int, int]:
        """Exceptions delivered without an exit so far: vector to count."""
        counts = self._slots[Slot.DELIVERED : Slot.DELIVERED + 32]
        return {vector: count for vector, count in enumerate(counts) if count}

    def _queue(self, kind: int, vector: int, error_code: int, next_rip: int = 0) -> None:
        slots = self._slots
        self._vectoring = None
        slots[_KIND] = kind
        slots[_VECTOR] = vector
        slots[_ERROR] = error_code
        slots[_NEXT_RIP] = next_rip
        slots[_OLD] = _OLD_OF.get(vector, _NONE) if kind == _EXCEPTION else _NONE

    def _requeue(self) -> None:
        """Deliver again what an exit interrupted, as the handler chose nothing else."""
        slots = self._slots
        self._queue(
            self._interrupted, slots[Slot.IN_VECTOR], slots[Slot.IN_ERROR], slots[Slot.NEXT_RIP]
        )

    def _block_nmi(self, blocked: bool) -> None:
        self._nmi_blocked = blocked
        at = Env.INTERCEPT // 8
        if blocked:
            self._env64[at] |= _IRET_BIT
        else:
            self._env64[at] &= ~_IRET_BIT
