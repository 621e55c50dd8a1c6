"""Ranges, collisions and accesses that no device answers."""

import pytest

from trapline.base.errors import BadMachineError
from trapline.machine.devices.bus import MAX_NOTED, Bus


class Latch:
    """Remembers what is written to each offset and the sizes it was asked for."""

    def __init__(self):
        self.values = {}
        self.sizes = []

    def read(self, offset, size):
        self.sizes.append(size)
        return self.values.get(offset, 0x100 | offset)

    def write(self, offset, size, value):
        self.sizes.append(size)
        self.values[offset] = value


@pytest.fixture
def bus():
    return Bus("port", 1 << 16)


def test_unknown_addresses_read_all_ones_and_are_noted(bus):
    assert bus.read(0x80, 1) == 0xFF
    assert bus.read(0x80, 4) == 0xFFFF_FFFF
    bus.write(0x81, 2, 0x1234)
    assert bus.unclaimed == {0x80: 2, 0x81: 1}


def test_the_number_of_noted_addresses_is_bounded(bus):
    for port in range(2 * MAX_NOTED):
        bus.read(port, 1)
    assert len(bus.unclaimed) == MAX_NOTED


def test_a_device_sees_offsets_and_the_bus_cuts_its_answers(bus):
    latch = Latch()
    bus.add(0x3F8, 8, "uart", latch)
    assert bus.read(0x3FA, 1) == 2
    bus.write(0x3F9, 1, 0x1FF)
    assert latch.values == {1: 0xFF}


def test_wide_accesses_are_split_for_narrow_devices(bus):
    latch = Latch()
    bus.add(0x70, 2, "rtc", latch)
    bus.write(0x70, 2, 0xABCD)
    assert latch.values == {0: 0xCD, 1: 0xAB}
    assert bus.read(0x70, 4) == 0xFFFF_ABCD
    assert set(latch.sizes) == {1}


def test_an_access_that_begins_before_a_device_reaches_it(bus):
    latch = Latch()
    bus.add(0x70, 2, "rtc", latch)
    bus.write(0x6F, 2, 0x55AA)
    assert latch.values == {0: 0x55}
    assert bus.read(0x6E, 4) == 0x0155_FFFF


def test_a_wide_device_takes_wide_accesses_whole(bus):
    latch = Latch()
    bus.add(0x100, 8, "wide", latch, width=4)
    bus.write(0x104, 4, 0x1122_3344)
    assert latch.values == {4: 0x1122_3344}


def test_the_last_port_does_not_wrap(bus):
    first = Latch()
    bus.add(0, 1, "first", first)
    bus.write(0xFFFF, 2, 0x1234)
    assert bus.read(0xFFFF, 2) == 0xFFFF
    assert first.values == {}


@pytest.mark.parametrize("start", [0x6F, 0x70, 0x71])
def test_collisions_are_refused(bus, start):
    bus.add(0x70, 2, "rtc", Latch())
    with pytest.raises(BadMachineError, match=r"rtc both claim port 0x7[01]"):
        bus.add(start, 2, "thief", Latch())
    assert len(bus.regions) == 1


@pytest.mark.parametrize(("start", "size"), [(0, 0), (-1, 2), (0xFFFF, 2), (0x10000, 1)])
def test_ranges_outside_the_space_are_refused(bus, start, size):
    with pytest.raises(BadMachineError, match="outside"):
        bus.add(start, size, "odd", Latch())


def test_neighbours_are_not_collisions(bus):
    bus.add(0x70, 2, "rtc", Latch())
    bus.add(0x72, 1, "above", Latch())
    bus.add(0x6F, 1, "below", Latch())
    assert [region.name for region in bus.regions] == ["below", "rtc", "above"]
