"""Priorities, the timer's three modes and interprocessor interrupts to oneself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.machine.devices.lapic import LVT_MASKED, SVR_ENABLED, ApicMsr, LocalApic

FREQUENCY = 2_000_000_000
TICK = 80  # cycles per 25 MHz tick


class Clock:
    def __init__(self):
        self.now = 1000

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def nmis():
    return []


@pytest.fixture
def apic(clock, nmis):
    apic = LocalApic(clock, FREQUENCY, lambda: nmis.append(1))
    apic.write_msr(ApicMsr.SVR, SVR_ENABLED | 0xFF)
    return apic


def test_the_highest_vector_goes_first(apic):
    apic.raise_vector(0x31)
    apic.raise_vector(0xEC)
    assert apic.accept() == 0xEC
    assert apic.pending() is None  # 0x31 waits behind the one in service
    assert apic.write(ApicMsr.EOI, 0)
    assert apic.accept() == 0x31


def test_the_same_class_does_not_nest(apic):
    apic.raise_vector(0x41)
    assert apic.accept() == 0x41
    apic.raise_vector(0x4F)
    assert apic.accept() is None
    apic.raise_vector(0x50)
    assert apic.accept() == 0x50


def test_tpr_holds_its_class_and_below(apic):
    assert apic.write(ApicMsr.TPR, 0x50)
    apic.raise_vector(0x5F)
    assert apic.pending() is None
    assert apic.read(ApicMsr.PPR) == 0x50
    apic.raise_vector(0x60)
    assert apic.pending() == 0x60


def test_irr_and_isr_can_be_read_in_banks(apic):
    apic.raise_vector(0x21)
    apic.raise_vector(0xFF)
    assert apic.read(ApicMsr.IRR + 1) == 2
    assert apic.read(ApicMsr.IRR + 7) == 1 << 31
    apic.accept()
    assert apic.read(ApicMsr.ISR + 7) == 1 << 31
    assert apic.read(ApicMsr.TMR + 7) == 0


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (ApicMsr.EOI, 1),
        (ApicMsr.TPR, 0x100),
        (ApicMsr.SELF_IPI, 0x100),
        (ApicMsr.PPR, 0),
        (ApicMsr.IRR, 0),
    ],
)
def test_writes_that_the_cpu_refuses(apic, index, value):
    assert not apic.write(index, value)


def test_deadline_fires_once_at_its_time(apic, clock):
    apic.write_msr(ApicMsr.LVT_TIMER, 2 << 17 | 0xEC)
    apic.write_msr(ApicMsr.TSC_DEADLINE, 5000)
    assert apic.read_msr(ApicMsr.TSC_DEADLINE) == 5000
    clock.now = 4999
    assert not apic.tick()
    clock.now = 5000
    assert apic.tick()
    assert apic.pending() == 0xEC
    assert apic.read_msr(ApicMsr.TSC_DEADLINE) == 0
    assert not apic.tick()


def test_a_zero_deadline_disarms(apic, clock):
    apic.write_msr(ApicMsr.LVT_TIMER, 2 << 17 | 0xEC)
    apic.write_msr(ApicMsr.TSC_DEADLINE, 5000)
    apic.write_msr(ApicMsr.TSC_DEADLINE, 0)
    clock.now = 6000
    assert not apic.tick()


def test_the_deadline_is_ignored_outside_its_mode(apic):
    apic.write_msr(ApicMsr.TSC_DEADLINE, 5000)
    assert apic.due is None
    assert apic.read_msr(ApicMsr.TSC_DEADLINE) == 0


def test_one_shot_counts_down_and_stops(apic, clock):
    apic.write_msr(ApicMsr.DIVIDE, 0xB)
    apic.write_msr(ApicMsr.LVT_TIMER, 0xEC)
    apic.write_msr(ApicMsr.INITIAL_COUNT, 100)
    clock.now += 40 * TICK
    assert apic.read_msr(ApicMsr.CURRENT_COUNT) == 60
    clock.now += 60 * TICK
    assert apic.tick()
    assert apic.pending() == 0xEC
    assert apic.due is None
    assert apic.read_msr(ApicMsr.CURRENT_COUNT) == 0


def test_periodic_goes_on_and_coalesces_missed_ticks(apic, clock):
    apic.write_msr(ApicMsr.DIVIDE, 0)
    apic.write_msr(ApicMsr.LVT_TIMER, 1 << 17 | 0xEC)
    apic.write_msr(ApicMsr.INITIAL_COUNT, 10)
    start = clock.now
    period = 10 * 2 * TICK
    clock.now = start + 10_000_000 * period + 1
    assert apic.tick()
    assert apic.due == start + 10_000_001 * period
    assert not apic.tick()


def test_a_masked_timer_does_not_interrupt(apic, clock):
    apic.write_msr(ApicMsr.LVT_TIMER, LVT_MASKED | 2 << 17 | 0xEC)
    apic.write_msr(ApicMsr.TSC_DEADLINE, 2000)
    clock.now = 2000
    assert apic.tick()
    assert apic.pending() is None


def test_disabling_the_apic_masks_all_lvt_entries(apic):
    apic.write_msr(ApicMsr.LVT_TIMER, 0xEC)
    apic.write_msr(ApicMsr.SVR, 0xFF)
    assert apic.read_msr(ApicMsr.LVT_TIMER) & LVT_MASKED
    apic.write_msr(ApicMsr.LVT_TIMER, 0xEC)
    assert apic.read_msr(ApicMsr.LVT_TIMER) & LVT_MASKED


@pytest.mark.parametrize(
    ("icr", "delivered"),
    [
        (0x0004_0041, True),  # self
        (0x0008_0041, True),  # all
        (0x000C_0041, False),  # all but self
        (0x0000_0041, True),  # physical, id 0
        (0x1_0000_0041, False),  # physical, id 1
        (0xFFFF_FFFF_0000_0041, True),  # broadcast
        (0x1_0000_0841, True),  # logical, cluster 0, member 0
        (0x2_0000_0841, False),  # logical, member 1
        (0x1_0001_0000_0841, False),  # logical, cluster 1
        (0x0004_0541, False),  # INIT
    ],
)
def test_icr_destinations(apic, icr, delivered):
    assert apic.write_msr(ApicMsr.ICR, icr)
    assert (apic.pending() == 0x41) is delivered
    assert apic.read_msr(ApicMsr.ICR) == icr


def test_an_nmi_to_oneself_is_passed_on(apic, nmis):
    apic.write_msr(ApicMsr.ICR, 0x0004_0400)
    assert nmis == [1]
    assert apic.pending() is None


def test_illegal_vectors_show_in_esr_after_it_is_written(apic):
    apic.write_msr(ApicMsr.ICR, 0x0004_0005)
    apic.write(ApicMsr.SELF_IPI, 5)
    assert apic.read_msr(ApicMsr.ESR) == 0
    assert apic.write_msr(ApicMsr.ESR, 0)
    assert apic.read_msr(ApicMsr.ESR) == 0x60
    assert apic.pending() is None


def test_identity(apic):
    assert apic.read_msr(ApicMsr.ID) == 0
    assert apic.read_msr(ApicMsr.LDR) == 1
    assert apic.read_msr(ApicMsr.VERSION) & 0xFF == 0x14
    assert apic.read_msr(0x804) is None
    assert not apic.write_msr(ApicMsr.ID, 1)


@given(
    st.lists(
        st.tuples(st.integers(0x6E0, 0x8FF), st.integers(0, (1 << 64) - 1), st.booleans()),
        max_size=40,
    )
)
def test_no_write_breaks_it(writes):
    clock = Clock()
    apic = LocalApic(clock, FREQUENCY, lambda: None)
    for index, value, page in writes:
        (apic.write if page else apic.write_msr)(index, value)
        clock.now += value & 0xFFFF_FFFF
        apic.tick()
        apic.accept()
        answer = apic.read_msr(index)
        assert answer is None or 0 <= answer < 1 << 64
        assert 0 <= apic.read(index) < 1 << 32
        assert apic.due is None or apic.due > 0


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_a_held_timer_fires_when_it_is_let_go(apic, clock, mode):
    apic.write_msr(ApicMsr.DIVIDE, 0xB)
    apic.write_msr(ApicMsr.LVT_TIMER, mode << 17 | 0xEC)
    apic.write_msr(ApicMsr.INITIAL_COUNT, 100)
    apic.write_msr(ApicMsr.TSC_DEADLINE, clock.now + 100 * TICK)
    due = apic.due
    assert due == clock.now + 100 * TICK
    with apic.holding():
        assert apic.due is None
        clock.now = due + TICK
        assert not apic.tick()
        assert apic.pending() is None
    assert apic.due == due
    assert apic.tick()
    assert apic.pending() == 0xEC


def test_the_guest_reads_and_programs_a_held_timer(apic):
    apic.write_msr(ApicMsr.LVT_TIMER, 2 << 17 | 0xEC)
    with apic.holding():
        apic.write_msr(ApicMsr.TSC_DEADLINE, 5000)
        assert apic.read_msr(ApicMsr.TSC_DEADLINE) == 5000
        assert apic.due is None
    assert apic.due == 5000
    with apic.holding():
        apic.write_msr(ApicMsr.TSC_DEADLINE, 0)
    assert apic.due is None


def test_a_held_timer_is_let_go_whatever_ends_the_context(apic):
    apic.write_msr(ApicMsr.LVT_TIMER, 2 << 17 | 0xEC)
    apic.write_msr(ApicMsr.TSC_DEADLINE, 7000)
    with pytest.raises(KeyError), apic.holding():
        raise KeyError
    assert apic.due == 7000
