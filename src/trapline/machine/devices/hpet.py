"""An HPET: the main counter and three timers (IA-PC HPET specification 1.0a).

No timer can raise an interrupt: none of them has a route (Tn_INT_ROUTE_CAP is 0) and there is
no legacy replacement, so a guest can read the time and nothing else.
"""

from enum import IntEnum

from trapline.machine.devices.interface import Clock

SIZE = 0x400
FREQUENCY = 100_000_000  # Hz
FEMTOSECONDS = 10**15 // FREQUENCY
TIMERS = 3
VENDOR = 0x8086
REVISION = 1
COUNTER_64_BIT = 1 << 13
CAPABILITIES = FEMTOSECONDS << 32 | VENDOR << 16 | COUNTER_64_BIT | (TIMERS - 1) << 8 | REVISION
ENABLED = 1
MASK64 = (1 << 64) - 1


class Register(IntEnum):
    """Offsets of the 64-bit registers; timer n has three of them at 0x100 + 0x20 n."""

    CAPABILITIES = 0x000
    CONFIGURATION = 0x010
    STATUS = 0x020
    COUNTER = 0x0F0
    TIMERS = 0x100


class TimerRegister(IntEnum):
    """Offsets inside a timer's block."""

    CONFIGURATION = 0x00
    COMPARATOR = 0x08


TIMER_STRIDE = 0x20
TIMER_64_BIT = 1 << 5
TIMER_WRITABLE = 0x3E46  # type, enable, periodic, value set, 32-bit mode, route


class Hpet:
    """`clock` and `frequency` are the virtual TSC and its cycles per second."""

    def __init__(self, clock: Clock, frequency: int) -> None:
        self._clock = clock
        self._divisor = frequency // FREQUENCY
        self._enabled = False
        self._base = 0  # the counter while it stands, else counter minus clock
        self._timers = [[TIMER_64_BIT, MASK64] for _ in range(TIMERS)]

    def read(self, offset: int, size: int) -> int:
        """Answer an MMIO read of 4 or 8 bytes."""
        whole = self._read(offset & -8)
        return whole >> 8 * (offset & 7) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Take an MMIO write of 4 or 8 bytes; other sizes are not defined and ignored."""
        if size < 4:
            return
        register, shift = offset & -8, 8 * (offset & 7)
        mask = (1 << 8 * size) - 1 << shift & MASK64
        self._write(register, self._read(register) & ~mask | value << shift & mask)

    def _counter(self) -> int:
        if not self._enabled:
            return self._base
        return self._clock() // self._divisor + self._base & MASK64

    def _read(self, register: int) -> int:
        if register == Register.COUNTER:
            return self._counter()
        if register == Register.CAPABILITIES:
            return CAPABILITIES
        if register == Register.CONFIGURATION:
            return int(self._enabled)
        timer, place = divmod(register - Register.TIMERS, TIMER_STRIDE)
        if 0 <= timer < TIMERS and place in (0, 8):
            return self._timers[timer][place >> 3]
        return 0

    def _write(self, register: int, value: int) -> None:
        if register == Register.CONFIGURATION:
            self._enable(bool(value & ENABLED))
        elif register == Register.COUNTER:
            if not self._enabled:  # writing it while it runs is undefined
                self._base = value
        else:
            timer, place = divmod(register - Register.TIMERS, TIMER_STRIDE)
            if not 0 <= timer < TIMERS:
                return
            if place == TimerRegister.CONFIGURATION:
                self._timers[timer][0] = value & TIMER_WRITABLE | TIMER_64_BIT
            elif place == TimerRegister.COMPARATOR:
                self._timers[timer][1] = value

    def _enable(self, enabled: bool) -> None:
        counter = self._counter()
        self._enabled = enabled
        self._base = counter
        if enabled:
            self._base = counter - self._clock() // self._divisor
