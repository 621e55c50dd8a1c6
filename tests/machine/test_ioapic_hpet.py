"""The two devices that a board has only when asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.machine.devices.hpet import CAPABILITIES, Hpet
from trapline.machine.devices.ioapic import IoApic, WindowOffset


@pytest.fixture
def raised():
    return []


@pytest.fixture
def ioapic(raised):
    return IoApic(raised.append)


def register(ioapic, index):
    ioapic.write(WindowOffset.SELECT, 4, index)
    return ioapic.read(WindowOffset.DATA, 4)


def program(ioapic, pin, low, high=0):
    for index, value in ((0x11 + 2 * pin, high), (0x10 + 2 * pin, low)):
        ioapic.write(WindowOffset.SELECT, 4, index)
        ioapic.write(WindowOffset.DATA, 4, value)


def pulse(ioapic, pin):
    ioapic.set_line(pin, True)
    ioapic.set_line(pin, False)


def test_identity(ioapic):
    assert register(ioapic, 1) == 0x00170020
    ioapic.write(WindowOffset.SELECT, 4, 0)
    ioapic.write(WindowOffset.DATA, 4, 0xFFFFFFFF)
    assert register(ioapic, 0) == 0x0F000000


def test_inputs_are_masked_at_first(ioapic, raised):
    pulse(ioapic, 4)
    assert raised == []
    assert register(ioapic, 0x18) == 0x10000


def test_a_rising_edge_interrupts_once(ioapic, raised):
    program(ioapic, 4, 0x31)
    ioapic.set_line(4, True)
    ioapic.set_line(4, True)
    ioapic.set_line(4, False)
    assert raised == [0x31]
    pulse(ioapic, 4)
    assert raised == [0x31, 0x31]


@pytest.mark.parametrize(
    ("low", "high", "delivered"),
    [
        (0x0031, 0x00000000, True),  # physical, id 0
        (0x0031, 0x01000000, False),
        (0x0031, 0xFF000000, True),  # broadcast
        (0x0831, 0x01000000, True),  # logical
        (0x0831, 0x02000000, False),
        (0x0131, 0x00000000, True),  # lowest priority
        (0x0431, 0x00000000, False),  # NMI
    ],
)
def test_destinations(ioapic, raised, low, high, delivered):
    program(ioapic, 4, low, high)
    pulse(ioapic, 4)
    assert bool(raised) is delivered


def test_a_level_input_waits_for_its_eoi(ioapic, raised):
    program(ioapic, 9, 0x8051)
    ioapic.set_line(9, True)
    assert register(ioapic, 0x22) == 0xC051
    ioapic.set_line(9, False)
    ioapic.set_line(9, True)
    assert raised == [0x51]
    ioapic.write(WindowOffset.EOI, 4, 0x51)
    assert raised == [0x51, 0x51]  # still asserted


def test_remote_irr_is_read_only(ioapic):
    program(ioapic, 9, 0xD051)
    assert register(ioapic, 0x22) == 0x8051


@given(
    st.lists(
        st.tuples(st.integers(0, 0xFFF), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1))
    )
)
def test_no_write_breaks_the_ioapic(writes):
    raised = []
    ioapic = IoApic(raised.append)
    for offset, size, value in writes:
        ioapic.write(WindowOffset.SELECT, 4, value & 0xFF)
        ioapic.write(offset, size, value & (1 << 8 * size) - 1)
        ioapic.write(WindowOffset.DATA, 4, value)
        pulse(ioapic, value % 24)
        assert 0 <= ioapic.read(WindowOffset.DATA, 4) < 1 << 32
        assert all(0 <= vector <= 0xFF for vector in raised)


class Clock:
    def __init__(self):
        self.now = 1_000_000

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def hpet(clock):
    return Hpet(clock, 2_000_000_000)


def test_the_hpet_says_what_it_is(hpet):
    assert hpet.read(0, 8) == CAPABILITIES
    assert hpet.read(4, 4) == 10_000_000  # femtoseconds
    assert hpet.read(0, 4) >> 8 & 0x1F == 2  # timers, less one
    assert hpet.read(0x104, 4) == 0  # no interrupt routes


def test_the_counter_runs_while_enabled(hpet, clock):
    clock.now += 2000
    assert hpet.read(0xF0, 8) == 0
    hpet.write(0x10, 4, 1)
    clock.now += 2000
    assert hpet.read(0xF0, 8) == 100
    hpet.write(0x10, 4, 0)
    clock.now += 2000
    assert hpet.read(0xF0, 8) == 100


def test_the_counter_can_be_set_while_it_stands(hpet, clock):
    hpet.write(0xF0, 8, 0xFFFFFFFF)
    hpet.write(0x10, 4, 1)
    hpet.write(0xF0, 8, 5)
    clock.now += 20
    assert hpet.read(0xF0, 4) == 0
    assert hpet.read(0xF4, 4) == 1


def test_comparators_hold_their_value(hpet):
    hpet.write(0x108, 8, 0x1122334455667788)
    hpet.write(0x108, 4, 0xAABBCCDD)
    assert hpet.read(0x108, 8) == 0x11223344AABBCCDD
    hpet.write(0x100, 4, 0xFFFFFFFF)
    assert hpet.read(0x100, 4) & 0x8000 == 0


@given(
    st.lists(
        st.tuples(st.integers(0, 0x3F8), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1))
    )
)
def test_no_write_breaks_the_hpet(writes):
    clock = Clock()
    hpet = Hpet(clock, 2_000_000_000)
    for offset, size, value in writes:
        hpet.write(offset, size, value & (1 << 8 * size) - 1)
        clock.now += value & 0xFFFFFFFF
        assert 0 <= hpet.read(offset, size) < 1 << 8 * size
