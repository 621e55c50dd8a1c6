"""QEMU's devices on a machine's buses: DMA that is refused, waiting, and what is announced."""

import os
import shutil

import pytest

from trapline.cpu import memoryfile
from trapline.machine.devices.bus import Bus
from trapline.machine.devices.lapic import LocalApic
from trapline.machine.loader import acpi, gpamap
from trapline.machine.loader.acpi import Board
from trapline.machine.qemu import board as board_module
from trapline.machine.qemu import catalogue, process
from trapline.machine.qemu.board import QemuBoard

MEMORY = 64 << 20
FREQUENCY = 2_000_000_000
PAGE = 4096
needs_qemu = pytest.mark.skipif(
    shutil.which(process.EXECUTABLE) is None, reason="qemu-system-x86 is not installed"
)


class Sept:
    """Pages that are shared, by GPA."""

    def __init__(self):
        self.shared = set()

    def not_shared(self, gpa, size):
        return [page for page in range(gpa, gpa + size, PAGE) if page not in self.shared]


class Rig:
    def __init__(self, *devices):
        self.memory = memoryfile.create(MEMORY)
        self.sept = Sept()
        apic = LocalApic(lambda: 0, FREQUENCY, lambda: None)
        self.board = QemuBoard(
            [catalogue.parse(device) for device in devices],
            self.memory,
            MEMORY,
            apic=apic,
            ioapic=None,
            frequency=FREQUENCY,
        )
        self.ports, self.mmio = Bus("port", 1 << 16), Bus("MMIO", 1 << 39)
        self.board.attach(self.ports, self.mmio, self.sept)

    def config(self, slot, register, size=4):
        self.ports.write(0xCF8, 4, 1 << 31 | slot << 11 | register)
        return self.ports.read(0xCFC + (register & 3), size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.board.close()
        os.close(self.memory)


@needs_qemu
def test_the_bus_has_the_device_and_the_bridge_only():
    with Rig("net") as rig:
        present = {f"{rig.config(slot, 0):08x}" for slot in range(32)} - {"ffffffff"}
        assert present == {"12378086", "70008086", "10411af4"}
        rig.ports.write(0xCF8, 4, 1 << 31 | 1 << 11 | 1 << 8)  # the chipset's IDE function
        assert rig.ports.read(0xCFC, 4) == 0xFFFFFFFF
        (function,) = rig.board.functions
        assert function.id == "1af4:1041"


@needs_qemu
def test_registers_are_reached_through_the_buses():
    with Rig("net") as rig:
        (function,) = rig.board.functions
        address = next(bar.address for bar in function.bars if bar.index == 4)
        assert address in gpamap.PCI_MMIO
        rig.mmio.write(address, 4, 1)  # device_feature_select of the common configuration
        assert rig.mmio.read(address, 4) == 1
        assert rig.mmio.read(address + 4, 4) & 1  # VIRTIO_F_VERSION_1 is feature bit 32


@needs_qemu
def test_dma_to_private_memory_is_refused_and_to_shared_memory_is_not():
    with Rig("net") as rig:
        shared, private = 5 * PAGE, 9 * PAGE
        rig.sept.shared.add(shared)
        for gpa in (shared, private):
            os.pwrite(rig.memory, b"from a device", gpa)
        rig.board.inspect()
        assert rig.board.refused == 1
        assert rig.board.refused_pages == [private]
        assert os.pread(rig.memory, 4, shared) == b"from"
        assert os.pread(rig.memory, 4, private) == bytes(4)
        rig.board.inspect()
        assert rig.board.refused == 1


@needs_qemu
def test_a_device_that_ignores_what_is_shared_is_caught():
    """Let the entropy device fill a page by its own DMA engine, not by our hand."""
    with Rig("qemu:virtio-rng-pci,disable-legacy=on") as rig:
        (function,) = rig.board.functions
        common = next(bar.address for bar in function.bars if bar.index == 4)
        ring, used, buffer = 0x10000, 0x12000, 0x13000
        rig.sept.shared |= {ring, ring + PAGE, used}
        for status in (1, 3):
            rig.mmio.write(common + 20, 1, status)
        rig.mmio.write(common + 8, 4, 1)
        rig.mmio.write(common + 12, 4, 1)
        rig.mmio.write(common + 20, 1, 11)
        rig.mmio.write(common + 22, 2, 0)
        for offset, address in ((32, ring), (40, ring + PAGE), (48, used)):
            rig.mmio.write(common + offset, 8, address)
        os.pwrite(rig.memory, buffer.to_bytes(8, "little") + b"\x08\0\0\0\2\0\0\0", ring)
        os.pwrite(rig.memory, b"\1\0\1\0\0\0", ring + PAGE)  # no interrupt, one buffer
        rig.mmio.write(common + 28, 2, 1)
        rig.mmio.write(common + 20, 1, 15)
        rig.mmio.write(common + 0x3000, 2, 0)
        for _ in range(200):
            rig.board.wait(None)
            if os.pread(rig.memory, 4, used) == b"\0\0\1\0":
                break
        rig.board.inspect()
        assert rig.board.refused_pages == [buffer]


@needs_qemu
def test_waiting_never_passes_more_than_was_asked_for(monkeypatch):
    monkeypatch.setattr(board_module, "WAIT_SECONDS", 0.01)
    with Rig("net") as rig:
        assert rig.board.wait(1000) == 1000
        rig.board.touch()
        assert 0 <= rig.board.wait(FREQUENCY) <= FREQUENCY
        assert rig.board.wait(None) > 0


def test_the_dsdt_announces_the_bridge_when_there_is_one():
    assert b"PCI0" not in acpi.dsdt(Board())
    bridge = acpi.dsdt(Board(pci=True))
    assert b"PCI0" in bridge
    assert b"_PRT" not in bridge
    assert b"_PRT" in acpi.dsdt(Board(pci=True, ioapic=True))


def test_pins_are_spread_over_the_inputs():
    assert [acpi.pci_gsi(1, pin) for pin in range(4)] == list(gpamap.PCI_GSIS)
    assert acpi.pci_gsi(2, 0) == acpi.pci_gsi(1, 1)
    assert acpi.pci_gsi(4, 1) == acpi.pci_gsi(1, 0)
