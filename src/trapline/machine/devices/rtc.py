"""The clock part of an MC146818 behind ports 0x70 and 0x71, with its 128 bytes of memory.

Its time is `epoch` (seconds since 1970, UTC) plus the virtual time since power-on: the same
run reads the same times. There is no alarm and no interrupt, and no update is ever in
progress when the guest looks.
"""

from datetime import UTC, datetime
from enum import IntEnum

from trapline.machine.devices.interface import Clock

INDEX_PORT = 0x70
PORTS = 2
DEFAULT_EPOCH = 1_767_225_600  # 2026-01-01 00:00:00 UTC


class Register(IntEnum):
    """CMOS addresses of the MC146818; CENTURY is the PC's convention."""

    SECONDS = 0x00
    SECONDS_ALARM = 0x01
    MINUTES = 0x02
    MINUTES_ALARM = 0x03
    HOURS = 0x04
    HOURS_ALARM = 0x05
    WEEKDAY = 0x06
    DAY = 0x07
    MONTH = 0x08
    YEAR = 0x09
    STATUS_A = 0x0A
    STATUS_B = 0x0B
    STATUS_C = 0x0C
    STATUS_D = 0x0D
    CENTURY = 0x32


STATUS_A_32KHZ_1024HZ = 0x26
STATUS_B_24_HOURS = 0x02
STATUS_B_BINARY = 0x04
STATUS_D_VALID = 0x80
MEMORY = 128


def _bcd(value: int) -> int:
    return value // 10 << 4 | value % 10


class CmosRtc:
    """The two ports: 0 selects the address, 1 is the data."""

    def __init__(self, clock: Clock, frequency: int, epoch: int = DEFAULT_EPOCH) -> None:
        self._clock = clock
        self._frequency = frequency
        self._epoch = epoch
        self._index = 0
        self._memory = bytearray(MEMORY)
        self._memory[Register.STATUS_A] = STATUS_A_32KHZ_1024HZ
        self._memory[Register.STATUS_B] = STATUS_B_24_HOURS
        self._memory[Register.STATUS_D] = STATUS_D_VALID

    def read(self, offset: int, size: int) -> int:
        """Answer a one-byte read; the index port cannot be read on a PC."""
        del size
        if offset == 0:
            return 0xFF
        field = self._time_field()
        if field is None:
            return self._memory[self._index]
        binary = self._memory[Register.STATUS_B] & STATUS_B_BINARY
        return field if binary else _bcd(field)

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a one-byte write; the time itself is fixed and cannot be set."""
        del size
        if offset == 0:
            self._index = value & MEMORY - 1  # bit 7 masks NMI on a PC; there is none here
        elif self._index not in (Register.STATUS_C, Register.STATUS_D):
            # STATUS_A bit 7 says that an update is in progress and cannot be written.
            mask = 0x7F if self._index == Register.STATUS_A else 0xFF
            self._memory[self._index] = value & mask

    def _time_field(self) -> int | None:
        now = datetime.fromtimestamp(self._epoch + self._clock() // self._frequency, UTC)
        fields: dict[int, int] = {
            Register.SECONDS: now.second,
            Register.MINUTES: now.minute,
            Register.HOURS: now.hour,
            Register.WEEKDAY: now.isoweekday() % 7 + 1,
            Register.DAY: now.day,
            Register.MONTH: now.month,
            Register.YEAR: now.year % 100,
            Register.CENTURY: now.year // 100,
        }
        return fields.get(self._index)
