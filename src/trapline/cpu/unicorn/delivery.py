"""Events into the guest: exceptions, interrupts, NMIs, and what holds them back.

Delivery itself is native (`interrupthook`); this module decides what is delivered and keeps NMI
blocking, which the core forgets on direct delivery.
"""

from typing import Final, NamedTuple

from trapline.cpu.unicorn.core import Core
from trapline.cpu.unicorn.libunicorn import Env, HFlags, InterruptRequest, Svm
from trapline.cpu.unicorn.registerfile import RFLAGS_RF, RFLAGS_TF
from trapline.cpu.unicorn.slots import DeliveryKind, Slot

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
_EXCEPTION: Final = DeliveryKind.EXCEPTION
_COUNT, _KIND, _VECTOR, _ERROR = Slot.COUNT, Slot.KIND, Slot.VECTOR, Slot.ERROR
_NEXT_RIP, _OLD = Slot.NEXT_RIP, Slot.OLD
_IRET_BIT: Final = 1 << (Svm.IRET - Svm.INTR)


def _make_double_fault(first: int, second: int) -> bool:
    if second in _CONTRIBUTORY:
        return first in _CONTRIBUTORY or first in _PAGE_FAULTS
    return first in _PAGE_FAULTS and second in _PAGE_FAULTS


class SavedEvents(NamedTuple):
    """What is under delivery, whether NMIs are blocked, and an IRET is passing."""

    vectoring: int | None
    interrupted: int
    triple_fault: bool
    nmi_blocked: bool
    iret_passing: bool


class EventDelivery:
    """Queues the next event for the native hook.

    `vectoring` is the vector of the event whose delivery ended in the exit at hand, if any, and
    `interrupted` its kind. `triple_fault`: what was delivered last made one. `nmi_blocked`:
    an NMI was delivered and no IRET executed since (SDM vol. 3A section 6.7.1). `iret_watched`:
    IRETs are to be told of; `iret_passing`: one has been, and has yet to execute.
    """

    def __init__(self, core: Core, slots: memoryview) -> None:
        self._slots = slots
        self._regs = core.fields.regs
        self._env32 = core.fields.env32
        self._env64 = core.fields.env64
        self.vectoring: int | None = None
        self.interrupted = DeliveryKind.NONE
        self.triple_fault = False
        self.nmi_blocked = False
        self.iret_watched = False
        self.iret_passing = False
        self.intercept_exceptions(frozenset())

    def deliver(self, vector: int, error_code: int | None = None) -> None:
        """Deliver an exception at RIP, as a fault, before the next instruction.

        Whether the error code is pushed follows from the vector. If an event was being
        delivered at the exit, the two are combined as the processor does.
        """
        code = error_code or 0
        first = self.vectoring
        if first is not None:
            self.vectoring = None
            if first == DF and (vector in _CONTRIBUTORY or vector in _PAGE_FAULTS):
                self.triple_fault = True
                return
            if _make_double_fault(first, vector):
                vector, code = DF, 0
        self.queue(DeliveryKind.EXCEPTION, vector, code)

    def deliver_interrupt(self, vector: int) -> None:
        """Deliver an external interrupt at RIP; IF is the caller's concern."""
        self.queue(DeliveryKind.INTERRUPT, vector, 0)

    def deliver_nmi(self) -> None:
        """Deliver an NMI at RIP and block further ones until an IRET has begun."""
        self.block_nmi(True)
        self.queue(DeliveryKind.INTERRUPT, NMI, 0)

    def request_interrupt_window(self, wanted: bool) -> None:
        """Exit with INTERRUPT_WINDOW before the next instruction with IF set and no shadow."""
        slots = self._slots
        if wanted:
            slots[Slot.WANTED] |= InterruptRequest.VIRQ
        else:
            slots[Slot.WANTED] &= ~InterruptRequest.VIRQ

    def advance(self, length: int) -> None:
        """Complete an emulated instruction: step RIP, end shadows, trap if TF is set."""
        words, regs = self._env32, self._regs
        flags = words[_HFLAGS]
        regs[16] = regs[16] + length & (_MASK64 if flags & _CS64 else 0xFFFFFFFF)
        if flags & _INHIBIT_IRQ:
            words[_HFLAGS] = flags & ~_INHIBIT_IRQ
        eflags = words[_EFLAGS]
        if eflags & _RF_TF:
            words[_EFLAGS] = eflags & ~RFLAGS_RF
            if eflags & RFLAGS_TF:
                self._env64[_DR6] |= _DR6_BS
                self.queue(DeliveryKind.EXCEPTION, DB, 0)
        self._slots[_COUNT] += 1

    def intercept_exceptions(self, vectors: frozenset[int]) -> None:
        """Choose the exceptions that exit with EXCEPTION before they are delivered."""
        mask = sum(1 << vector for vector in vectors)
        self._slots[Slot.TRAPPED] = mask
        # #UD always exits: TDCALL and RDRAND are found there.
        self._env32[Env.INTERCEPT_EXCEPTIONS // 4] = mask | 1 << 6

    def watch_iret(self, wanted: bool) -> None:
        """Have the core tell of each IRET, or no longer."""
        if wanted != self.iret_watched:
            self.iret_watched = wanted
            self._intercept_iret()

    def queue(self, kind: int, vector: int, error_code: int, next_rip: int = 0) -> None:
        """Have the native hook deliver an event (`DeliveryKind`) before the next instruction."""
        slots = self._slots
        self.vectoring = None
        slots[_KIND] = kind
        slots[_VECTOR] = vector
        slots[_ERROR] = error_code
        slots[_NEXT_RIP] = next_rip
        slots[_OLD] = _OLD_OF.get(vector, _NONE) if kind == _EXCEPTION else _NONE

    def requeue(self) -> None:
        """Deliver again what an exit interrupted, as the handler chose nothing else."""
        slots = self._slots
        self.queue(
            self.interrupted, slots[Slot.IN_VECTOR], slots[Slot.IN_ERROR], slots[Slot.NEXT_RIP]
        )

    def block_nmi(self, blocked: bool) -> None:
        """Block NMIs until an IRET begins, of which the core then tells, or no longer."""
        self.nmi_blocked = blocked
        self._intercept_iret()

    def begin_iret(self) -> None:
        """Unblock NMIs, and let the IRET pass of which the core tells."""
        self.iret_passing = self.iret_watched
        self.block_nmi(False)

    def end_iret(self) -> None:
        """Take note of a boundary: no IRET is passing."""
        if self.iret_passing:
            self.iret_passing = False
            self._intercept_iret()

    def _intercept_iret(self) -> None:
        at = Env.INTERCEPT // 8
        if self.nmi_blocked or (self.iret_watched and not self.iret_passing):
            self._env64[at] |= _IRET_BIT
        else:
            self._env64[at] &= ~_IRET_BIT

    def save(self) -> SavedEvents:
        """Return what is not in the slots."""
        return SavedEvents(
            self.vectoring,
            self.interrupted,
            self.triple_fault,
            self.nmi_blocked,
            self.iret_passing,
        )

    def load(self, saved: SavedEvents) -> None:
        """Return to a saved state."""
        self.vectoring, self.interrupted, self.triple_fault = saved[:3]
        self.nmi_blocked, self.iret_passing = saved[3:]
        self._intercept_iret()
