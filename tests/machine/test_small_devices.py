"""RTC, PIT, power registers and the console."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.machine.devices.console import KEEP, Console
from trapline.machine.devices.pit import FREQUENCY as PIT_HZ
from trapline.machine.devices.pit import Pit, SystemControlPort
from trapline.machine.devices.power import AcpiPower
from trapline.machine.devices.rtc import CmosRtc
from trapline.machine.devices.rtc import Register as Cmos

HZ = 2_000_000_000


class Clock:
    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def cmos(rtc, register):
    rtc.write(0, 1, register)
    return rtc.read(1, 1)


# RTC


def test_the_rtc_starts_at_its_epoch_in_bcd(clock):
    rtc = CmosRtc(clock, HZ, epoch=1_782_220_089)  # 2026-06-23 13:08:09, a Tuesday
    fields = [Cmos.CENTURY, Cmos.YEAR, Cmos.MONTH, Cmos.DAY, Cmos.HOURS, Cmos.MINUTES, Cmos.SECONDS]
    assert [cmos(rtc, field) for field in fields] == [0x20, 0x26, 0x06, 0x23, 0x13, 0x08, 0x09]
    assert cmos(rtc, Cmos.WEEKDAY) == 3


def test_the_rtc_follows_virtual_time_only(clock):
    rtc = CmosRtc(clock, HZ)
    assert cmos(rtc, Cmos.SECONDS) == 0
    clock.now = 75 * HZ
    assert (cmos(rtc, Cmos.MINUTES), cmos(rtc, Cmos.SECONDS)) == (0x01, 0x15)


def test_the_rtc_can_be_read_in_binary(clock):
    rtc = CmosRtc(clock, HZ)
    clock.now = 59 * HZ
    rtc.write(0, 1, Cmos.STATUS_B)
    rtc.write(1, 1, 0x06)
    assert cmos(rtc, Cmos.SECONDS) == 59


def test_no_update_is_ever_in_progress_and_memory_is_valid(clock):
    rtc = CmosRtc(clock, HZ)
    rtc.write(0, 1, Cmos.STATUS_A)
    rtc.write(1, 1, 0xFF)
    assert cmos(rtc, Cmos.STATUS_A) == 0x7F
    rtc.write(0, 1, Cmos.STATUS_D)
    rtc.write(1, 1, 0)
    assert cmos(rtc, Cmos.STATUS_D) == 0x80


def test_cmos_memory_holds_bytes_and_the_nmi_mask_is_no_address(clock):
    rtc = CmosRtc(clock, HZ)
    rtc.write(0, 1, 0x80 | 0x40)
    rtc.write(1, 1, 0x5A)
    assert cmos(rtc, 0x40) == 0x5A
    assert rtc.read(0, 1) == 0xFF


# PIT


def test_channel_two_counts_down_at_its_frequency(clock):
    pit = Pit(clock, HZ)
    pit.write(3, 1, 0xB0)
    pit.write(2, 1, 0xFF)
    pit.write(2, 1, 0xFF)
    clock.now = HZ * 0x1234 // PIT_HZ + 1
    low, high = pit.read(2, 1), pit.read(2, 1)
    assert high << 8 | low == 0xFFFF - 0x1234


def test_a_latched_count_stands_still(clock):
    pit = Pit(clock, HZ)
    pit.write(3, 1, 0xB0)
    pit.write(2, 1, 0)
    pit.write(2, 1, 0x80)
    pit.write(3, 1, 0x80)
    clock.now = HZ // 100
    assert (pit.read(2, 1), pit.read(2, 1)) == (0x00, 0x80)
    assert (pit.read(2, 1), pit.read(2, 1)) != (0x00, 0x80)


def test_the_output_rises_at_terminal_count(clock):
    pit = Pit(clock, HZ)
    control = SystemControlPort(pit)
    control.write(0, 1, 1)
    pit.write(3, 1, 0xB0)
    pit.write(2, 1, 0x9C)
    pit.write(2, 1, 0x2E)  # 11932: 10 ms
    assert not control.read(0, 1) & 0x20
    clock.now = HZ * 9 // 1000
    assert not control.read(0, 1) & 0x20
    clock.now = HZ * 10 // 1000 + 2000
    assert control.read(0, 1) & 0x20


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 255), st.integers(0, 1 << 40))))
def test_no_write_breaks_the_pit(writes):
    clock = Clock()
    pit = Pit(clock, HZ)
    control = SystemControlPort(pit)
    for offset, value, passed in writes:
        device = control if offset == 4 else pit
        device.write(offset & 3, 1, value)
        clock.now += passed
        assert 0 <= pit.read(offset & 3, 1) <= 0xFF
        assert 0 <= control.read(0, 1) <= 0xFF


# Power


@pytest.mark.parametrize(
    ("offset", "value", "events"),
    [
        (0, 0x34, ["off"]),  # SLP_EN, S5
        (0, 0x14, []),  # S5 without SLP_EN
        (0, 0x24, []),  # S1
        (1, 0x34, []),
        (2, 0x06, ["reset"]),
        (2, 0x0E, []),
    ],
)
def test_power_registers(offset, value, events):
    seen = []
    power = AcpiPower(lambda: seen.append("off"), lambda: seen.append("reset"))
    power.write(offset, 1, value)
    assert seen == events
    assert power.read(offset, 1) == 0


# Console


def send(console, data):
    for byte in data:
        console.put(byte)


def test_the_console_passes_on_lines():
    echoed, lines = [], []
    console = Console(echo=echoed.append, on_line=lines.append)
    send(console, b"one\r\ntwo")
    assert echoed == [b"one\r\n"]
    console.flush()
    assert echoed == [b"one\r\n", b"two"]
    assert lines == [b"one", b"two"]


def test_the_digest_does_not_depend_on_flushes():
    whole, parts = Console(), Console()
    send(whole, b"a line\nand more")
    send(parts, b"a li")
    parts.flush()
    send(parts, b"ne\nand more")
    assert whole.digest == parts.digest
    send(parts, b"!")
    assert whole.digest != parts.digest


def test_the_limit_is_told_once_and_memory_is_bounded():
    calls = []
    console = Console(limit=10, on_limit=lambda: calls.append(1))
    send(console, b"x" * 10)
    assert calls == []
    send(console, b"x" * (KEEP + 10_000))
    assert calls == [1]
    assert len(console.kept) <= KEEP + Console.MAX_LINE
