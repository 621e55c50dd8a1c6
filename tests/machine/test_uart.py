"""The serial port, driven as Linux's 8250 driver drives it."""

import pytest

from trapline.machine.devices.uart import FIFO_SIZE, Register, Uart16550

DLAB = 0x80
LOOP = 0x10


class Wire:
    def __init__(self):
        self.sent = bytearray()
        self.levels = []

    @property
    def level(self):
        return bool(self.levels) and self.levels[-1]


@pytest.fixture
def wire():
    return Wire()


@pytest.fixture
def uart(wire):
    return Uart16550(wire.sent.append, wire.levels.append)


def read(uart, register):
    return uart.read(register, 1)


def write(uart, register, value):
    uart.write(register, 1, value)


def test_bytes_go_to_the_sink_and_the_transmitter_stays_empty(uart, wire):
    for byte in b"hello":
        assert read(uart, Register.LSR) & 0x60 == 0x60
        write(uart, Register.DATA, byte)
    assert wire.sent == b"hello"


def test_the_divisor_latch_hides_data_and_ier(uart, wire):
    write(uart, Register.LCR, DLAB | 3)
    write(uart, Register.DATA, 0x34)
    write(uart, Register.IER, 0x12)
    assert (read(uart, Register.DATA), read(uart, Register.IER)) == (0x34, 0x12)
    write(uart, Register.LCR, 3)
    assert read(uart, Register.IER) == 0
    assert wire.sent == b""


def test_only_the_four_interrupt_enables_of_a_16550_exist(uart):
    write(uart, Register.IER, 0xFF)
    assert read(uart, Register.IER) == 0x0F


def test_fifos_show_in_iir_only_when_enabled(uart):
    assert read(uart, Register.IIR) == 0x01
    write(uart, Register.IIR, 0x01)
    assert read(uart, Register.IIR) == 0xC1


def test_loopback_connects_modem_lines(uart):
    assert read(uart, Register.MSR) == 0xB0
    # autoconfig: loop with RTS and OUT2 must give CTS and DCD.
    write(uart, Register.MCR, LOOP | 0x0A)
    assert read(uart, Register.MSR) & 0xF0 == 0x90


@pytest.mark.parametrize(("fcr", "expected"), [(0x01, FIFO_SIZE), (0x00, 1)])
def test_the_fifo_can_be_measured_in_loopback(uart, wire, fcr, expected):
    write(uart, Register.IIR, fcr)
    write(uart, Register.MCR, LOOP)
    for value in range(256):
        write(uart, Register.DATA, value)
    received = []
    while read(uart, Register.LSR) & 1:
        received.append(read(uart, Register.DATA))
    assert received == list(range(expected))
    assert wire.sent == b""


def test_overrun_is_reported_once(uart):
    write(uart, Register.MCR, LOOP)
    write(uart, Register.DATA, 1)
    write(uart, Register.DATA, 2)
    assert read(uart, Register.LSR) & 2
    assert not read(uart, Register.LSR) & 2


def test_clearing_the_receive_fifo_drops_its_bytes(uart):
    write(uart, Register.IIR, 1)
    uart.receive(7)
    write(uart, Register.IIR, 3)
    assert not read(uart, Register.LSR) & 1


def test_enabling_thri_interrupts_at_once_and_iir_acknowledges(uart, wire):
    write(uart, Register.IER, 2)
    assert wire.level
    assert read(uart, Register.IIR) == 0x02
    assert not wire.level
    assert read(uart, Register.IIR) == 0x01


def test_each_byte_sent_gives_a_new_edge(uart, wire):
    write(uart, Register.IER, 2)
    write(uart, Register.DATA, 65)
    write(uart, Register.DATA, 66)
    rises = sum(1 for a, b in zip([False, *wire.levels], wire.levels, strict=False) if b and not a)
    assert rises == 3


def test_received_data_goes_before_an_empty_transmitter(uart, wire):
    write(uart, Register.IER, 3)
    uart.receive(65)
    assert read(uart, Register.IIR) == 0x04
    assert read(uart, Register.DATA) == 65
    assert read(uart, Register.IIR) == 0x02
    assert not wire.level


def test_scratch_and_line_control_keep_their_value(uart):
    write(uart, Register.SCRATCH, 0x5A)
    write(uart, Register.LCR, 0x1B)
    assert (read(uart, Register.SCRATCH), read(uart, Register.LCR)) == (0x5A, 0x1B)
