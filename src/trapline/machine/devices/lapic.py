"""A local APIC in x2APIC mode with its timer (SDM 3A, chapter 11).

In a TD the registers fall into two halves (TDX module 1.5.01, msr_config_lookup.c): TPR, PPR,
EOI, ISR, TMR, IRR and SELF_IPI are served by the virtual APIC page without an exit (`read` and
`write`, which have the form of `vmm_interface.VirtualApic`); all others take #VE and come to
the VMM as RDMSR and WRMSR calls (`read_msr` and `write_msr`).

One processor, APIC id 0. Level-triggered interrupts are not modelled: a TD has no EOI exit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum

from trapline.machine.devices.interface import Clock

CRYSTAL_HZ = 25_000_000  # the timer's clock; a TD's is the core crystal of CPUID leaf 0x15
APIC_ID = 0
VECTORS = 256
LAST_RESERVED_VECTOR = 15


class ApicMsr(IntEnum):
    """MSR indices (SDM 3A, table 11-6)."""

    TSC_DEADLINE = 0x6E0
    ID = 0x802
    VERSION = 0x803
    TPR = 0x808
    PPR = 0x80A
    EOI = 0x80B
    LDR = 0x80D
    SVR = 0x80F
    ISR = 0x810
    TMR = 0x818
    IRR = 0x820
    ESR = 0x828
    CMCI = 0x82F
    ICR = 0x830
    LVT_TIMER = 0x832
    LVT_THERMAL = 0x833
    LVT_PERFORMANCE = 0x834
    LVT_LINT0 = 0x835
    LVT_LINT1 = 0x836
    LVT_ERROR = 0x837
    INITIAL_COUNT = 0x838
    CURRENT_COUNT = 0x839
    DIVIDE = 0x83E
    SELF_IPI = 0x83F


class TimerMode(IntEnum):
    """Bits 18:17 of LVT_TIMER."""

    ONE_SHOT = 0
    PERIODIC = 1
    TSC_DEADLINE = 2
    RESERVED = 3


class DeliveryMode(IntEnum):
    """Bits 10:8 of ICR."""

    FIXED = 0
    LOWEST_PRIORITY = 1
    SMI = 2
    RESERVED_3 = 3
    NMI = 4
    INIT = 5
    START_UP = 6
    RESERVED_7 = 7


class Shorthand(IntEnum):
    """Bits 19:18 of ICR."""

    NONE = 0
    SELF = 1
    ALL = 2
    ALL_BUT_SELF = 3


LVT_MASKED = 1 << 16
LVT_WRITABLE = 0x7_F7FF & ~(1 << 12)  # delivery status is read-only
VERSION = 5 << 16 | 0x14  # six LVT entries, integrated APIC
SVR_ENABLED = 1 << 8
ICR_LOGICAL = 1 << 11
BROADCAST = 0xFFFF_FFFF
ESR_SEND_ILLEGAL_VECTOR = 1 << 5
ESR_RECEIVE_ILLEGAL_VECTOR = 1 << 6
MASK32 = 0xFFFF_FFFF
BANKS = 8  # of 32 bits each in ISR, TMR and IRR
DIVISORS = {0: 2, 1: 4, 2: 8, 3: 16, 8: 32, 9: 64, 10: 128, 11: 1}
PLAIN_LVT = range(ApicMsr.LVT_THERMAL, ApicMsr.LVT_ERROR + 1)


class LocalApic:
    """The one local APIC.

    `clock` and `frequency` are the virtual TSC and its cycles per second. `nmi` is called
    for an NMI that the guest sends to itself.
    """

    def __init__(self, clock: Clock, frequency: int, nmi: Callable[[], None]) -> None:
        self._clock = clock
        self._cycles_per_tick = frequency // CRYSTAL_HZ
        self._nmi = nmi
        self._irr = 0
        self._isr = 0
        self._tpr = 0
        self._svr = 0xFF
        self._esr = 0
        self._latched_esr = 0
        self._icr = 0
        self._divide = 0
        self._initial_count = 0
        self._lvt = dict.fromkeys((ApicMsr.LVT_TIMER, *PLAIN_LVT, ApicMsr.CMCI), LVT_MASKED)
        self._deadline: int | None = None  # what the guest has programmed
        self._is_held = False
        # When the timer fires next, in cycles of the clock; None while it is stopped or held.
        self.due: int | None = None

    # Interrupts.

    def raise_vector(self, vector: int) -> None:
        """Accept a fixed interrupt; vectors below 16 are an error (SDM 3A, 11.5.2)."""
        if vector <= LAST_RESERVED_VECTOR:
            self._esr |= ESR_RECEIVE_ILLEGAL_VECTOR
        else:
            self._irr |= 1 << (vector & VECTORS - 1)

    def pending(self) -> int | None:
        """Return the vector that would interrupt the processor now, if it allowed it."""
        if not self._irr:
            return None
        vector = self._irr.bit_length() - 1
        return vector if vector >> 4 > self._ppr() >> 4 else None

    @property
    def in_service(self) -> int:
        """The vectors whose end is still to come, a bit each."""
        return self._isr

    def accept(self) -> int | None:
        """Move the pending vector from IRR to ISR, as the processor's acknowledge does."""
        vector = self.pending()
        if vector is not None:
            self._irr &= ~(1 << vector)
            self._isr |= 1 << vector
        return vector

    def _ppr(self) -> int:
        in_service = (self._isr.bit_length() - 1) & 0xF0 if self._isr else 0
        return self._tpr if self._tpr & 0xF0 >= in_service else in_service

    # Timer.

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Keep the timer from firing while the context lasts: a host may delay it at will.

        The guest reads what it has programmed; what has become due fires afterwards.
        """
        self._is_held, self.due = True, None
        try:
            yield
        finally:
            self._is_held, self.due = False, self._deadline

    def _program(self, deadline: int | None) -> None:
        self._deadline = deadline
        self.due = None if self._is_held else deadline

    def tick(self) -> bool:
        """Fire the timer if it is due; True when it was."""
        now = self._clock()
        due = self.due
        if due is None or now < due:
            return False
        lvt = self._lvt[ApicMsr.LVT_TIMER]
        if self._timer_mode() == TimerMode.PERIODIC:
            period = self._period()
            self._program(due + ((now - due) // period + 1) * period)  # missed ticks coalesce
        else:
            self._program(None)
        if not lvt & LVT_MASKED:
            self.raise_vector(lvt & 0xFF)
        return True

    def _timer_mode(self) -> TimerMode:
        return TimerMode(self._lvt[ApicMsr.LVT_TIMER] >> 17 & 3)

    def _period(self) -> int:
        return max(1, self._initial_count * DIVISORS[self._divide] * self._cycles_per_tick)

    def _start_count(self) -> None:
        if self._timer_mode() in (TimerMode.TSC_DEADLINE, TimerMode.RESERVED):
            return  # writes to the count are ignored (SDM 3A, 11.5.4.1)
        self._program(self._clock() + self._period() if self._initial_count else None)

    def _current_count(self) -> int:
        if self._deadline is None or self._timer_mode() == TimerMode.TSC_DEADLINE:
            return 0
        ticks = DIVISORS[self._divide] * self._cycles_per_tick
        return max(0, self._deadline - self._clock()) // ticks & MASK32

    # The virtual APIC page: no exit.

    def read(self, index: int) -> int:
        """Answer RDMSR of a register that a TD reaches without an exit."""
        if index == ApicMsr.TPR:
            return self._tpr
        if index == ApicMsr.PPR:
            return self._ppr()
        if ApicMsr.ISR <= index < ApicMsr.ISR + BANKS:
            return self._isr >> 32 * (index - ApicMsr.ISR) & MASK32
        if ApicMsr.IRR <= index < ApicMsr.IRR + BANKS:
            return self._irr >> 32 * (index - ApicMsr.IRR) & MASK32
        return 0  # TMR: all edge-triggered

    def write(self, index: int, value: int) -> bool:
        """Carry out WRMSR of such a register; False for #GP(0)."""
        if index == ApicMsr.EOI:
            if value:
                return False
            if self._isr:
                self._isr &= ~(1 << self._isr.bit_length() - 1)
            return True
        if index == ApicMsr.TPR:
            if value > 0xFF:
                return False
            self._tpr = value
            return True
        if index == ApicMsr.SELF_IPI:
            if value > 0xFF:
                return False
            self.raise_vector(value)
            return True
        return False

    # The VMM's part.

    def read_msr(self, index: int) -> int | None:
        """Answer a RDMSR call; None when there is no such register."""
        if index == ApicMsr.TSC_DEADLINE:
            armed = self._timer_mode() == TimerMode.TSC_DEADLINE
            return self._deadline or 0 if armed else 0
        if index in self._lvt:
            return self._lvt[ApicMsr(index)]
        if index == ApicMsr.CURRENT_COUNT:
            return self._current_count()
        values: dict[int, int] = {
            ApicMsr.ID: APIC_ID,
            ApicMsr.VERSION: VERSION,
            ApicMsr.LDR: 1 << APIC_ID,
            ApicMsr.SVR: self._svr,
            ApicMsr.ESR: self._latched_esr,
            ApicMsr.ICR: self._icr,
            ApicMsr.INITIAL_COUNT: self._initial_count,
            ApicMsr.DIVIDE: self._divide,
        }
        return values.get(index)

    def write_msr(self, index: int, value: int) -> bool:
        """Carry out a WRMSR call; False when the register does not exist or refuses it."""
        if index == ApicMsr.TSC_DEADLINE:
            if self._timer_mode() == TimerMode.TSC_DEADLINE:
                self._program(value or None)
            return True
        if index == ApicMsr.ICR:
            return self._write_icr(value)
        if value > MASK32:
            return False
        if index in self._lvt:
            self._write_lvt(ApicMsr(index), value)
            return True
        if index == ApicMsr.SVR:
            self._write_svr(value)
            return True
        if index == ApicMsr.ESR:
            self._latched_esr, self._esr = self._esr, 0
            return value == 0
        if index == ApicMsr.INITIAL_COUNT:
            self._initial_count = value
            self._start_count()
            return True
        if index == ApicMsr.DIVIDE and value in DIVISORS:
            self._divide = value
            return True
        return False

    def _write_svr(self, value: int) -> None:
        self._svr = value & 0x1FF
        if not self._svr & SVR_ENABLED:
            for entry in self._lvt:
                self._lvt[entry] |= LVT_MASKED

    def _write_lvt(self, entry: ApicMsr, value: int) -> None:
        before = self._timer_mode()
        if not self._svr & SVR_ENABLED:
            value |= LVT_MASKED
        self._lvt[entry] = value & LVT_WRITABLE
        if entry == ApicMsr.LVT_TIMER:
            after = self._timer_mode()
            if TimerMode.TSC_DEADLINE in (before, after) and before != after:
                self._program(None)  # changing to or from deadline mode disarms (SDM 3A, 11.5.4.1)

    def _write_icr(self, value: int) -> bool:
        self._icr = value
        if not self._for_us(value):
            return True
        mode = DeliveryMode(value >> 8 & 7)
        vector = value & 0xFF
        if mode in (DeliveryMode.FIXED, DeliveryMode.LOWEST_PRIORITY):
            if vector <= LAST_RESERVED_VECTOR:
                self._esr |= ESR_SEND_ILLEGAL_VECTOR
            else:
                self.raise_vector(vector)
        elif mode == DeliveryMode.NMI:
            self._nmi()
        # INIT and start-up IPIs have no effect on a running TD VCPU; SMI does not exist.
        return True

    @staticmethod
    def _for_us(icr: int) -> bool:
        shorthand = Shorthand(icr >> 18 & 3)
        if shorthand != Shorthand.NONE:
            return shorthand in (Shorthand.SELF, Shorthand.ALL)
        destination = icr >> 32
        if destination == BROADCAST:
            return True
        if icr & ICR_LOGICAL:
            return destination >> 16 == 0 and bool(destination & 1 << APIC_ID)
        return destination == APIC_ID
