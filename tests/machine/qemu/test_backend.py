import contextlib
import itertools
import os
import shutil
import socket
import struct

import pytest

from trapline.base.errors import BadMachineError, ToolMissingError, UsageError
from trapline.machine.qemu import catalogue, process
from trapline.machine.qemu.backend import QemuBackend
from trapline.machine.qemu.doorbell import VECTORS
from trapline.machine.qemu.process import QemuProcess
from trapline.machine.qemu.qtest import QemuDiedError, Qtest

MEMORY = 64 << 20
RNG = ["-device", "virtio-rng-pci,disable-legacy=on"]
BLK = "1af4:1042"

needs_qemu = pytest.mark.skipif(
    shutil.which(process.EXECUTABLE) is None, reason="qemu-system-x86 is not installed"
)


class Rig:
    """A back end on its own memory, with the vectors that it raised."""

    def __init__(self, arguments):
        self.memory = os.memfd_create("guest")
        os.ftruncate(self.memory, MEMORY)
        self.vectors = []
        self.lines = []
        started = QemuProcess.start(
            arguments, self.memory, MEMORY, lambda line, level: self.lines.append((line, level))
        )
        self.backend = QemuBackend(started, self.vectors.append)

    def close(self):
        words = self.backend.close()
        os.close(self.memory)
        return words

    def config(self, devfn, register, size=4):
        self.backend.write_config(0, 4, 1 << 31 | devfn << 8 | register & 0xFC)
        return self.backend.read_config(4 + (register & 3), size)

    def set_config(self, devfn, register, size, value):
        self.backend.write_config(0, 4, 1 << 31 | devfn << 8 | register & 0xFC)
        self.backend.write_config(4 + (register & 3), size, value)


@pytest.fixture
def rng():
    rig = Rig(RNG)
    yield rig
    rig.close()


def virtio_regions(rig, function):
    """Give the address of each virtio configuration structure by its type (virtio 1.2, 4.1.4)."""
    found = {}
    position = rig.config(function.devfn, 0x34, 1)
    bars = {bar.index: bar.address for bar in function.bars}
    while position:
        kind, after = (
            rig.config(function.devfn, position, 1),
            rig.config(function.devfn, position + 1, 1),
        )
        if kind == 9:
            bar = rig.config(function.devfn, position + 4, 1)
            offset = rig.config(function.devfn, position + 8)
            if bar in bars:
                found[rig.config(function.devfn, position + 3, 1)] = bars[bar] + offset
        position = after
    return found


@needs_qemu
def test_the_guest_sees_its_devices_and_not_the_doorbell(rng):
    ids = [function.id for function in rng.backend.functions]
    assert "1af4:1044" in ids
    assert "1af4:1110" not in ids
    assert rng.config(31 << 3, 0) == 0xFFFFFFFF
    for function in rng.backend.functions:
        assert rng.config(function.devfn, 0) == function.device << 16 | function.vendor


@needs_qemu
def test_bars_are_assigned_apart_and_enabled(rng):
    ranges = sorted(
        (bar.space, bar.address, bar.size) for f in rng.backend.functions for bar in f.bars
    )
    assert ranges
    for (space, start, size), (other, following, _) in itertools.pairwise(ranges):
        assert space != other or start + size <= following
    assert all(start % size == 0 for _, start, size in ranges)


@needs_qemu
def test_a_hidden_function_is_gone(rng):
    (function,) = (f for f in rng.backend.functions if f.id == "1af4:1044")
    bar = next(bar for bar in function.bars if bar.space == "memory" and bar.index == 4)
    assert rng.backend.read_memory(bar.address, 8) != (1 << 64) - 1
    before = rng.backend.read_memory(bar.address, 8)
    rng.backend.hide(function)
    assert rng.config(function.devfn, 0) == 0xFFFFFFFF
    # Nor do its registers answer whoever knows where they were.
    assert rng.backend.read_memory(bar.address, 8) != before


@needs_qemu
def test_msi_is_not_offered_as_its_messages_would_be_lost():
    rig = Rig(["-device", "ich9-ahci", "-device", "virtio-rng-pci,disable-legacy=on"])
    try:
        ids = {}
        for function in rig.backend.functions:
            position, found = rig.config(function.devfn, 0x34, 1), []
            while position and function.device in {0x2922, 0x1044}:
                found.append(rig.config(function.devfn, position, 2) & 0xFF)
                assert rig.config(function.devfn, position, 1) == found[-1]
                position = rig.config(function.devfn, position, 4) >> 8 & 0xFC
            ids[function.id] = found
        assert 5 not in ids["8086:2922"]
        assert 0x12 in ids["8086:2922"]  # what follows in the chain is still there
        assert 0x11 in ids["1af4:1044"]
    finally:
        rig.close()


@needs_qemu
def test_a_bridge_is_refused_by_name():
    memory = os.memfd_create("guest")
    os.ftruncate(memory, MEMORY)
    arguments = ["-device", "pci-bridge,chassis_nr=1"]
    started = QemuProcess.start(arguments, memory, MEMORY, lambda *_: None)
    with pytest.raises(BadMachineError, match="1b36:0001 is a bridge"):
        QemuBackend(started, lambda _: None)
    started.close()
    os.close(memory)


@needs_qemu
def test_dma_and_an_msix_message_arrive(rng):
    """Ask the entropy device for 8 bytes, as a guest driver would (virtio 1.2, 2.7 and 3.1)."""
    backend = rng.backend
    (function,) = (f for f in backend.functions if f.id == "1af4:1044")
    regions = virtio_regions(rng, function)
    common, notify = regions[1], regions[2]
    bars = {bar.index: bar.address for bar in function.bars}
    table = bars[function.msix.bar] + function.msix.offset
    for offset, value in ((0, 0xFEE00000), (4, 0), (8, 0x41), (12, 0)):
        backend.write_memory(table + offset, 4, value)
    assert backend.read_memory(table, 4) == 0xFEE00000
    assert backend.read_memory(table + 8, 4) == 0x41
    control = rng.config(function.devfn, function.msix.position + 2, 2)
    rng.set_config(function.devfn, function.msix.position + 2, 2, control | 1 << 15)

    descriptors, available, used, buffer = 0x10000, 0x11000, 0x12000, 0x13000
    for status in (0, 1, 3):
        backend.write_memory(common + 20, 1, status)
    backend.write_memory(common + 8, 4, 1)  # VIRTIO_F_VERSION_1
    backend.write_memory(common + 12, 4, 1)
    backend.write_memory(common + 20, 1, 11)
    backend.write_memory(common + 22, 2, 0)
    backend.write_memory(common + 26, 2, 0)  # queue vector
    for offset, address in ((32, descriptors), (40, available), (48, used)):
        backend.write_memory(common + offset, 8, address)
    os.pwrite(rng.memory, struct.pack("<QIHH", buffer, 8, 2, 0), descriptors)
    os.pwrite(rng.memory, struct.pack("<HHH", 0, 1, 0), available)
    backend.write_memory(common + 28, 2, 1)
    backend.write_memory(common + 20, 1, 15)
    backend.write_memory(notify, 2, 0)

    for _ in range(100):
        backend.poll(0.1)
        if rng.vectors:
            break
    assert rng.vectors == [0x41]
    assert os.pread(rng.memory, 4, used) == struct.pack("<HH", 0, 1)
    assert os.pread(rng.memory, 8, buffer) != bytes(8)


@needs_qemu
def test_a_message_to_no_apic_raises_nothing(rng):
    (function,) = (f for f in rng.backend.functions if f.id == "1af4:1044")
    table = {b.index: b.address for b in function.bars}[function.msix.bar] + function.msix.offset
    rng.backend.write_memory(table, 4, 0x1000)
    rng.backend.write_memory(table + 8, 4, 0x41)
    rng.backend.write_memory(table + 12, 4, 0)
    os.eventfd_write(rng.backend._process.doorbell.eventfds[0], 1)
    assert rng.backend.poll(1)
    assert rng.vectors == []


@needs_qemu
def test_masked_entries_take_no_interrupts_from_others():
    """Linux masks all 65 entries of an NVMe table; there are doorbells for 64."""
    rig = Rig([*RNG, "-device", "nvme,serial=x"])
    try:
        functions = {f.id: f for f in rig.backend.functions}
        tables = {
            name: {b.index: b.address for b in f.bars}[f.msix.bar] + f.msix.offset
            for name, f in functions.items()
            if f.msix is not None
        }
        nvme, card = tables["1b36:0010"], tables["1af4:1044"]
        entries = functions["1b36:0010"].msix.entries
        assert entries > VECTORS
        for entry in range(entries):
            rig.backend.write_memory(nvme + 16 * entry + 12, 4, 1)
        for offset, value in ((0, 0xFEE00000), (8, 0x41), (12, 0)):
            rig.backend.write_memory(card + offset, 4, value)
        os.eventfd_write(rig.backend._process.doorbell.eventfds[0], 1)
        assert rig.backend.poll(1)
        assert rig.vectors == [0x41]
        assert rig.backend.read_memory(card + 12, 4) == 0
    finally:
        rig.close()


@needs_qemu
def test_a_qemu_that_dies_is_reported(rng):
    rng.backend._process._process.kill()
    rng.backend._process._process.wait()
    with pytest.raises(QemuDiedError, match="died during the run"):
        rng.config(0, 0)


def test_a_qemu_that_hangs_is_not_said_to_be_dead():
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 1000))
    with ours, theirs, pytest.raises(QemuDiedError, match="no longer answers"):
        Qtest(ours, lambda *_: None).read_port(0xCF8, 4)


@needs_qemu
def test_qemus_own_words_when_it_refuses():
    with pytest.raises(BadMachineError, match="'nonsense' is not a valid device"):
        Rig(["-device", "nonsense"])


@needs_qemu
def test_a_qemu_that_leaves_while_it_is_greeted_is_quoted(monkeypatch):
    whole = process.Doorbell.greet

    def greet(doorbell, connection):
        whole(doorbell, connection)
        with contextlib.suppress(ConnectionResetError):
            connection.recv(1)  # until the other end is closed
        raise BrokenPipeError

    monkeypatch.setattr(process.Doorbell, "greet", greet)
    with pytest.raises(BadMachineError, match="'nonsense' is not a valid device"):
        Rig(["-device", "nonsense"])


def test_without_qemu_the_package_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ToolMissingError, match="apt-get install qemu-system-x86"):
        process.find()


def test_an_old_qemu_is_refused(monkeypatch, tmp_path):
    fake = tmp_path / process.EXECUTABLE
    fake.write_text("#!/bin/sh\necho QEMU emulator version 5.2.0\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ToolMissingError, match=r"too old; QEMU 7\.0"):
        process.find()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("blkk", "no device is called 'blkk'"),
        ("blk,fle=x", "does not take 'fle=x'"),
        ("blk,file=x,file=y", "does not take 'file=y'"),
        ("net,user", "does not take 'user'"),
        ("net,", "does not take ''"),
        ("blk,file=x,write=yes", "write= needs on or off, not 'yes'"),
        ("blk,file=", "file= needs a value"),
        ("console,file=x,socket=y", "takes one of file, socket"),
        ("uart", "mmio-uart"),
    ],
)
def test_a_bad_device_argument_is_explained(text, says):
    with pytest.raises(UsageError) as error:
        catalogue.parse(text)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("net,netdev=user,,hostfwd=tcp::8080-:80", {"netdev": "user,hostfwd=tcp::8080-:80"}),
        ("blk,file=a,,,write=on", {"file": "a,", "write": "on"}),
    ],
)
def test_a_comma_in_a_value_is_written_twice(text, options):
    assert catalogue.parse(text).options == options


def test_a_missing_image_is_named(tmp_path):
    request = catalogue.parse(f"blk,file={tmp_path / 'none.img'}")
    with pytest.raises(BadMachineError, match=r"none\.img: no such image file"):
        catalogue.arguments([request])


def test_images_are_read_only_unless_asked(tmp_path):
    image = tmp_path / "a,b.img"
    image.write_bytes(bytes(512))
    words = catalogue.arguments([catalogue.DeviceRequest("blk", {"file": str(image)})])
    assert "read-only=on" in words[1]
    assert "a,,b.img" in words[1]
    words = catalogue.arguments(
        [catalogue.DeviceRequest("blk", {"file": str(image), "write": "on"})]
    )
    assert "read-only=off" in words[1]


@needs_qemu
def test_an_image_has_one_writer(tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    writer = catalogue.parse(f"blk,file={image},write=on")
    reader = catalogue.parse(f"blk,file={image}")
    rig = Rig(catalogue.arguments([writer, reader]))
    try:
        with pytest.raises(BadMachineError, match="lock"):
            Rig(catalogue.arguments([writer]))
    finally:
        rig.close()


@needs_qemu
@pytest.mark.parametrize("name", sorted(catalogue.CATALOGUE))
def test_every_device_of_the_catalogue_has_the_id_it_claims(name, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    options = {"file": str(image), "share": str(tmp_path)}
    model = catalogue.CATALOGUE[name]
    request = catalogue.DeviceRequest(
        name, {k: v for k, v in options.items() if k in model.options}
    )
    rig = Rig(catalogue.arguments([request]))
    try:
        (function,) = (f for f in rig.backend.functions if f.id == model.pci_id)
        assert (function.msix is None) == model.needs_io_apic
    finally:
        rig.close()
