"""What is typed reaches the guest, all of it, and Ctrl-] leaves."""

import os

import pytest

from hostile import machine_of
from trapline.machine.devices.console import Console
from trapline.machine.devices.uart import FIFO_SIZE, Fcr, Register, Uart16550
from trapline.machine.keyboard import LEAVE
from trapline.machine.outcome import OutcomeKind

# Polls the first serial port, prints what comes, and powers off at a full stop.
ECHO = """
        out_byte 0x3fa, 1               # FIFOs on
next:   in_byte 0x3fd
        test r11d, 1
        jz next
        in_byte 0x3f8
        mov ebx, r11d
        mov r12d, 1
        mov r13d, 1
        mov r14d, 0x3f8
        mov r15d, ebx
        tdvmcall 30
        cmp bl, '.'
        jne next
        power_off
"""
IN_BYTE = """
        .macro in_byte port
        mov r12d, 1
        xor r13d, r13d
        mov r14d, \\port
        xor r15d, r15d
        tdvmcall 30
        .endm
"""


@pytest.fixture
def typed():
    """Return a function that has a guest echo what is typed: its outcome, and what it showed."""

    def run(data, *, closed=True):
        reading, writing = os.pipe()
        shown = []
        os.write(writing, data)
        if closed:
            os.close(writing)
        machine = machine_of(IN_BYTE + ECHO, keyboard=reading, echo=shown.append)
        try:
            return machine.run(), b"".join(shown)
        finally:
            machine.close()
            os.close(reading)
            if not closed:
                os.close(writing)

    return run


def test_a_paste_longer_than_the_fifo_comes_whole_and_in_order(typed):
    text = b"".join(b"line %d\n" % number for number in range(200)) + b"."
    outcome, shown = typed(text)
    assert outcome.kind == OutcomeKind.POWERED_OFF
    assert shown == text


def test_ctrl_right_bracket_leaves(typed):
    outcome, shown = typed(b"so far" + LEAVE + b" and no further.", closed=False)
    assert outcome.kind == OutcomeKind.LEFT
    assert outcome.is_clean
    assert b"no further" not in shown


def test_the_end_of_input_does_not_end_the_guest(typed):
    outcome, _ = typed(b"no full stop")
    assert outcome.kind in {OutcomeKind.HANG, OutcomeKind.TIMEOUT}


def test_the_port_says_how_much_it_takes():
    port = Uart16550([].append)
    assert port.room == 1
    port.write(Register.IIR, 1, Fcr.ENABLE)
    assert port.room == FIFO_SIZE
    port.receive(1)
    assert port.room == FIFO_SIZE - 1
    for _ in range(FIFO_SIZE):
        port.receive(2)
    assert port.room == 0


def test_a_prompt_is_shown_before_its_line_ends_and_once():
    shown = []
    console = Console(echo=shown.append)
    for byte in b"login: ":
        console.put(byte)
    console.show()
    console.show()
    for byte in b"root\r\n":
        console.put(byte)
    assert shown == [b"login: ", b"root\r\n"]
    console.flush()
    assert b"".join(shown) == b"login: root\r\n"
