"""A 16550A serial port: National Semiconductor PC16550D, as Linux's 8250 driver expects it.

The transmitter is infinitely fast: the holding register and the FIFO are empty whenever the
guest looks. Reception happens in loopback mode (the driver measures the FIFO with it) and
through `receive`.
"""

from collections import deque
from collections.abc import Callable
from enum import IntEnum, IntFlag

from trapline.machine.devices.interface import IrqLine, no_irq

COM1 = 0x3F8
COM1_IRQ = 4
# COM2 to COM4, where Linux looks for them (arch/x86/include/asm/serial.h).
FURTHER = (0x2F8, 0x3E8, 0x2E8)
PORTS = 8
FIFO_SIZE = 16


class Register(IntEnum):
    """Offsets; the first two are the divisor latch while LCR.DLAB is set."""

    DATA = 0  # RBR when read, THR when written
    IER = 1
    IIR = 2  # FCR when written
    LCR = 3
    MCR = 4
    LSR = 5
    MSR = 6
    SCRATCH = 7


class Ier(IntFlag):
    """Interrupt enable register."""

    RECEIVED = 1
    TRANSMIT_EMPTY = 2
    LINE_STATUS = 4
    MODEM_STATUS = 8


class Iir(IntFlag):
    """Interrupt identification register; the sources in the order of their priority."""

    NONE = 0x01
    LINE_STATUS = 0x06
    RECEIVED = 0x04
    TRANSMIT_EMPTY = 0x02
    MODEM_STATUS = 0x00
    FIFOS_ENABLED = 0xC0


class Fcr(IntFlag):
    """FIFO control register."""

    ENABLE = 1
    CLEAR_RECEIVE = 2


class Lsr(IntFlag):
    """Line status register."""

    DATA_READY = 0x01
    OVERRUN = 0x02
    HOLDING_EMPTY = 0x20
    TRANSMITTER_EMPTY = 0x40


LCR_DLAB = 0x80
MCR_LOOP = 0x10
MCR_MASK = 0x1F
# Data carrier detect, data set ready and clear to send: a terminal is connected.
MSR_CONNECTED = 0xB0


class Uart16550:
    """One port. `sink` gets each byte sent; `irq` follows the interrupt output."""

    def __init__(self, sink: Callable[[int], None], irq: IrqLine = no_irq) -> None:
        self._sink = sink
        self._irq = irq
        self._ier = 0
        self._fcr = 0
        self._lcr = 0
        self._mcr = 0
        self._scratch = 0
        self._divisor = 1
        self._overrun = False
        self._thre_pending = False
        self._line_level = False
        self._received: deque[int] = deque()

    @property
    def room(self) -> int:
        """How many bytes it takes from the line now."""
        size = FIFO_SIZE if self._fcr & Fcr.ENABLE else 1
        return max(0, size - len(self._received))

    def receive(self, byte: int) -> None:
        """Take a byte from the line; it is lost, with OVERRUN set, when the FIFO is full."""
        if not self.room:
            self._overrun = True
        else:
            self._received.append(byte & 0xFF)
        self._update_irq()

    def read(self, offset: int, size: int) -> int:
        """Answer a one-byte read."""
        del size
        if offset == Register.LSR:  # by far the most frequent
            return self._read_lsr()
        if offset == Register.IIR:
            return self._read_iir()
        if offset == Register.DATA:
            if self._lcr & LCR_DLAB:
                return self._divisor & 0xFF
            byte = self._received.popleft() if self._received else 0
            self._update_irq()
            return byte
        if offset == Register.IER:
            return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier
        if offset == Register.MSR:
            return self._modem_status()
        return {
            Register.LCR: self._lcr,
            Register.MCR: self._mcr,
            Register.SCRATCH: self._scratch,
        }[Register(offset)]

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a one-byte write."""
        del size
        if offset == Register.DATA:
            self._write_data(value)
        elif offset == Register.IER:
            self._write_ier(value)
        elif offset == Register.IIR:
            self._write_fcr(value)
        elif offset == Register.LCR:
            self._lcr = value
        elif offset == Register.MCR:
            self._mcr = value & MCR_MASK
        elif offset == Register.SCRATCH:
            self._scratch = value
        # LSR and MSR are read-only in normal operation.

    def _write_data(self, value: int) -> None:
        if self._lcr & LCR_DLAB:
            self._divisor = self._divisor & 0xFF00 | value
            return
        if self._mcr & MCR_LOOP:
            self.receive(value)
        else:
            self._sink(value)
        self._thre_pending = True  # sent at once, hence empty again
        self._update_irq(transmit_edge=True)

    def _write_ier(self, value: int) -> None:
        if self._lcr & LCR_DLAB:
            self._divisor = self._divisor & 0xFF | value << 8
            return
        enabled = value & ~self._ier & Ier.TRANSMIT_EMPTY
        self._ier = value & 0x0F
        if enabled:
            # Enabling the source with the register empty raises it (PC16550D, table V).
            self._thre_pending = True
        self._update_irq()

    def _write_fcr(self, value: int) -> None:
        toggled = (value ^ self._fcr) & Fcr.ENABLE
        if toggled or value & Fcr.CLEAR_RECEIVE:
            self._received.clear()
        self._fcr = value & 0xC9 if value & Fcr.ENABLE else 0
        self._update_irq()

    def _read_lsr(self) -> int:
        status = int(Lsr.HOLDING_EMPTY | Lsr.TRANSMITTER_EMPTY)
        if self._received:
            status |= Lsr.DATA_READY
        if self._overrun:
            status |= Lsr.OVERRUN
            self._overrun = False
            self._update_irq()
        return status

    def _read_iir(self) -> int:
        source = self._source()
        if source == Iir.TRANSMIT_EMPTY:
            self._thre_pending = False  # reading the source acknowledges it
            self._update_irq()
        fifos = int(Iir.FIFOS_ENABLED) if self._fcr & Fcr.ENABLE else 0
        return int(source) | fifos

    def _source(self) -> Iir:
        if self._overrun and self._ier & Ier.LINE_STATUS:
            return Iir.LINE_STATUS
        if self._received and self._ier & Ier.RECEIVED:
            return Iir.RECEIVED
        if self._thre_pending and self._ier & Ier.TRANSMIT_EMPTY:
            return Iir.TRANSMIT_EMPTY
        return Iir.NONE

    def _modem_status(self) -> int:
        if not self._mcr & MCR_LOOP:
            return MSR_CONNECTED
        # In loopback DTR, RTS, OUT1 and OUT2 come back as DSR, CTS, RI and DCD.
        mcr = self._mcr
        return (mcr & 1) << 5 | (mcr & 2) << 3 | (mcr & 4) << 4 | (mcr & 8) << 4

    def _update_irq(self, *, transmit_edge: bool = False) -> None:
        level = self._source() != Iir.NONE
        if level and transmit_edge and self._line_level:
            # The output falls while the register is full; an edge-triggered input sees it.
            self._irq(False)
            self._irq(True)
        elif level != self._line_level:
            self._irq(level)
        self._line_level = level
