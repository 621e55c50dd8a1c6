"""Level-triggered inputs of the IO-APIC, as Linux acknowledges them in a TD."""

import pytest

from trapline.machine.devices.ioapic import (
    LEVEL,
    MASKED,
    REMOTE_IRR,
    IoApic,
    Register,
    WindowOffset,
)

VECTOR = 0x31


class Board:
    def __init__(self):
        self.vectors = []
        self.chip = IoApic(self.vectors.append)

    def set(self, index, value):
        self.chip.write(WindowOffset.SELECT, 4, index)
        self.chip.write(WindowOffset.DATA, 4, value)

    def get(self, index):
        self.chip.write(WindowOffset.SELECT, 4, index)
        return self.chip.read(WindowOffset.DATA, 4)

    def entry(self, pin, value):
        self.set(Register.TABLE + 2 * pin, value)


@pytest.fixture
def board():
    return Board()


def test_a_level_waits_for_its_eoi_and_comes_again(board):
    board.entry(10, VECTOR | LEVEL)
    board.chip.set_line(10, True)
    board.chip.set_line(10, False)
    board.chip.set_line(10, True)
    assert board.vectors == [VECTOR]
    assert board.get(Register.TABLE + 20) & REMOTE_IRR
    board.chip.write(WindowOffset.EOI, 4, VECTOR + 1)
    assert board.vectors == [VECTOR]
    board.chip.write(WindowOffset.EOI, 4, VECTOR)
    assert board.vectors == [VECTOR, VECTOR]
    board.chip.set_line(10, False)
    board.chip.write(WindowOffset.EOI, 4, VECTOR)
    assert board.vectors == [VECTOR, VECTOR]
    assert not board.get(Register.TABLE + 20) & REMOTE_IRR


def test_unmasking_a_level_that_is_up_interrupts(board):
    board.entry(10, VECTOR | LEVEL | MASKED)
    board.chip.set_line(10, True)
    assert board.vectors == []
    board.entry(10, VECTOR | LEVEL)
    assert board.vectors == [VECTOR]


def test_the_way_old_chips_are_acknowledged_works_too(board):
    """Linux before an EOI register existed: mask and edge, then level again."""
    board.entry(10, VECTOR | LEVEL)
    board.chip.set_line(10, True)
    board.entry(10, VECTOR | MASKED)
    board.entry(10, VECTOR | LEVEL)
    assert board.vectors == [VECTOR, VECTOR]


def test_the_guest_cannot_set_remote_irr(board):
    board.entry(10, VECTOR | LEVEL | REMOTE_IRR)
    board.chip.set_line(10, True)
    assert board.vectors == [VECTOR]
