"""ACPI tables of a hardware-reduced platform (ACPI 6.4, chapters 3.11 and 5.2).

RSDP, XSDT, FADT, MADT and DSDT; with options an IO-APIC, an HPET, a memory-mapped serial port and
a PCI host bridge. There is
one processor, hence no multiprocessor wakeup mailbox. No 8259, no SCI and no PM timer are
announced.
"""

import struct
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

from trapline.base.errors import BadMachineError
from trapline.machine.devices import power, rtc, uart
from trapline.machine.loader import aml, gpamap

OEM_ID = b"TRAPLN"
OEM_TABLE_ID = b"SOFTWARE"
CREATOR_ID = b"TRPL"
REVISION = 1
HEADER = struct.Struct("<4sIBB6s8sI4sI")
CHECKSUM_AT = 9
ALIGNMENT = 64

FADT_SIZE = 276
FADT_REVISION = 6
FADT_MINOR = 5
FADT_WBINVD = 1 << 0
FADT_NO_POWER_BUTTON = 1 << 4
FADT_NO_SLEEP_BUTTON = 1 << 5
FADT_RESET_REGISTER = 1 << 10
FADT_HW_REDUCED = 1 << 20
BOOT_ARCH_NO_VGA = 1 << 2

MADT_LOCAL_APIC = 0
MADT_IO_APIC = 1
MADT_ENABLED = 1

HPET_ID = 0x8086_A201  # Intel, 64-bit main counter, three timers, revision 1
HPET_SIZE = 0x400
HPET_GSIS = (2, 8, 11)  # one for each timer
IOAPIC_ID = 1
PCI_SLOTS = 32


#: What `--device` calls the devices of the board itself; all others are QEMU's.
BOARD_DEVICES = ("ioapic", "hpet", "mmio-uart")


@dataclass(frozen=True, slots=True)
class Board:
    """What is on the board beyond processor, serial port, clock and power registers."""

    ioapic: bool = False
    hpet: bool = False
    pci: bool = False
    mmio_uart: bool = False  # a second serial port, with its registers in memory
    further_ports: int = 0  # serial ports at the places of COM2 and up
    tables: tuple[bytes, ...] = ()  # the user's, in place of those of the same name; SSDTs beside

    @property
    def extras(self) -> tuple[str, ...]:
        """What of it `--device` names, in the words used there."""
        there = (self.ioapic, self.hpet, self.mmio_uart)
        return tuple(compress(BOARD_DEVICES, there))


class Tables(NamedTuple):
    """The tables as one block for `gpamap.ACPI_TABLES`; `rsdp` is a GPA."""

    data: bytes
    rsdp: int


def checksum(data: bytes | bytearray) -> int:
    """Return the byte that makes the sum of all bytes 0 modulo 256."""
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """Put the common header in front of a table's body."""
    size = HEADER.size + len(body)
    header = HEADER.pack(
        signature, size, revision, 0, OEM_ID, OEM_TABLE_ID, REVISION, CREATOR_ID, REVISION
    )
    data = bytearray(header + body)
    data[CHECKSUM_AT] = checksum(data)
    return bytes(data)


def _port_register(port: int) -> bytes:
    """Encode a Generic Address Structure: one byte in system I/O space."""
    system_io, bits, byte_access = 1, 8, 1
    return struct.pack("<BBBBQ", system_io, bits, 0, byte_access, port)


def fadt(dsdt: int) -> bytes:
    """Build the FADT; offsets are those of ACPI 6.4, table 5.9."""
    body = bytearray(FADT_SIZE)
    flags = (
        FADT_WBINVD
        | FADT_NO_POWER_BUTTON
        | FADT_NO_SLEEP_BUTTON
        | FADT_RESET_REGISTER
        | FADT_HW_REDUCED
    )
    struct.pack_into("<I", body, 40, dsdt)
    struct.pack_into("<H", body, 109, BOOT_ARCH_NO_VGA)
    struct.pack_into("<I", body, 112, flags)
    body[116:128] = _port_register(power.PORT + power.Register.RESET)
    body[128] = power.RESET_VALUE
    body[131] = FADT_MINOR
    struct.pack_into("<Q", body, 140, dsdt)
    body[244:256] = _port_register(power.PORT + power.Register.SLEEP_CONTROL)
    body[256:268] = _port_register(power.PORT + power.Register.SLEEP_STATUS)
    body[268:276] = b"TRAPLINE"
    return table(b"FACP", FADT_REVISION, bytes(body[HEADER.size :]))


def madt(board: Board) -> bytes:
    """Build the MADT: local APIC 0, and IO-APIC 1 with GSI 0 up if there is one."""
    body = struct.pack("<II", gpamap.LOCAL_APIC, 0)
    body += struct.pack("<BBBBI", MADT_LOCAL_APIC, 8, 0, 0, MADT_ENABLED)
    if board.ioapic:
        body += struct.pack("<BBBBII", MADT_IO_APIC, 12, IOAPIC_ID, 0, gpamap.IOAPIC, 0)
    return table(b"APIC", 5, body)


def hpet() -> bytes:
    """Build the HPET table (IA-PC HPET specification 1.0a, 3.2.4)."""
    memory_space, bits = 0, 64
    address = struct.pack("<BBBBQ", memory_space, bits, 0, 0, gpamap.HPET)
    minimum_tick, page_protection = 128, 0
    body = struct.pack("<I", HPET_ID) + address
    return table(b"HPET", 1, body + struct.pack("<BHB", 0, minimum_tick, page_protection))


def dsdt(board: Board) -> bytes:
    r"""Build the DSDT: serial port, clock, optional HPET, and what \_S5 is called here."""
    serial = [aml.io_ports(uart.COM1, uart.PORTS)]
    if board.ioapic:
        serial.append(aml.interrupt(uart.COM1_IRQ))
    devices = [
        aml.device(
            "COM1",
            aml.name("_HID", aml.eisa_id("PNP0501")),
            aml.name("_UID", aml.integer(0)),
            aml.name("_CRS", aml.resources(*serial)),
        ),
        aml.device(
            "RTC0",
            aml.name("_HID", aml.eisa_id("PNP0B00")),
            aml.name("_CRS", aml.resources(aml.io_ports(rtc.INDEX_PORT, rtc.PORTS))),
        ),
    ]
    if board.hpet:
        registers = [aml.fixed_memory(gpamap.HPET, HPET_SIZE)]
        if board.ioapic:
            # Linux ignores an HPET without interrupts; the timers of this one have no routes.
            registers += [aml.interrupt(gsi) for gsi in HPET_GSIS]
        devices.append(
            aml.device(
                "HPET",
                aml.name("_HID", aml.eisa_id("PNP0103")),
                aml.name("_CRS", aml.resources(*registers)),
            )
        )
    if board.mmio_uart:
        # Linux takes memory for UPIO_MEM with registers a byte apart (8250_pnp.c).
        registers = [aml.fixed_memory(gpamap.MMIO_UART, uart.PORTS)]
        devices.append(
            aml.device(
                "COM2",
                aml.name("_HID", aml.eisa_id("PNP0501")),
                aml.name("_UID", aml.integer(1)),
                aml.name("_CRS", aml.resources(*registers)),
            )
        )
    for number, port in enumerate(uart.FURTHER[: board.further_ports]):
        # Found without this, too, but with the interrupt of a board that has an 8259.
        devices.append(
            aml.device(
                f"SER{number}",
                aml.name("_HID", aml.eisa_id("PNP0501")),
                aml.name("_UID", aml.integer(number + 2)),
                aml.name("_CRS", aml.resources(aml.io_ports(port, uart.PORTS))),
            )
        )
    if board.pci:
        devices.append(pci_host_bridge(board))
    off = aml.integer(power.SLP_TYP_S5)
    body = aml.scope("\\_SB", *devices)
    body += aml.name("\\_S5", aml.package(off, off, aml.integer(0), aml.integer(0)))
    return table(b"DSDT", 2, body)


def pci_host_bridge(board: Board) -> bytes:
    """Describe bus 0: its windows and, where there is an IO-APIC, where its INTx lines go."""
    config, ports, memory = gpamap.PCI_CONFIG_PORTS, gpamap.PCI_PORTS, gpamap.PCI_MMIO
    members = [
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name(
            "_CRS",
            aml.resources(
                aml.bus_numbers(0, 0),
                aml.io_ports(config.start, len(config)),
                aml.port_window(ports.start, ports.stop - 1),
                aml.memory_window(memory.start, memory.stop - 1),
            ),
        ),
    ]
    if board.ioapic:
        routes = [
            aml.package(
                aml.integer(slot << 16 | 0xFFFF),
                aml.integer(pin),
                aml.integer(0),
                aml.integer(pci_gsi(slot, pin)),
            )
            for slot in range(1, PCI_SLOTS)
            for pin in range(4)
        ]
        members.append(aml.name("_PRT", aml.package(*routes)))
    return aml.device("PCI0", *members)


def pci_gsi(slot: int, pin: int) -> int:
    """Return the IO-APIC input of a slot's pin (0: INTA), as the PIIX3 board is wired."""
    return gpamap.PCI_GSIS[(slot - 1 + pin) % len(gpamap.PCI_GSIS)]


def rsdp(xsdt: int) -> bytes:
    """Build the RSDP; it points at an XSDT only."""
    data = bytearray(
        struct.pack("<8sB6sBIIQB3s", b"RSD PTR ", 0, OEM_ID, 2, 0, 36, xsdt, 0, bytes(3))
    )
    data[8] = checksum(data[:20])
    data[32] = checksum(data)
    return bytes(data)


def tables(board: Board) -> Tables:
    """Lay out all tables from `gpamap.ACPI_TABLES` on, RSDP first."""
    base = gpamap.ACPI_TABLES
    blob = bytearray(ALIGNMENT)  # room for the RSDP

    def put(data: bytes) -> int:
        address = base + len(blob)
        blob.extend(data)
        blob.extend(bytes(-len(blob) % ALIGNMENT))
        return address

    given = {table[:4]: table for table in board.tables if table[:4] != b"SSDT"}
    pointers = [put(fadt(put(given.pop(b"DSDT", b"") or dsdt(board))))]
    pointers.append(put(given.pop(b"APIC", b"") or madt(board)))
    if board.hpet:
        pointers.append(put(given.pop(b"HPET", b"") or hpet()))
    pointers += map(put, given.values())
    pointers += (put(table) for table in board.tables if table[:4] == b"SSDT")
    xsdt = put(table(b"XSDT", 1, struct.pack(f"<{len(pointers)}Q", *pointers)))
    root = rsdp(xsdt)
    blob[: len(root)] = root
    if base + len(blob) > gpamap.ACPI_TABLES_END:
        raise BadMachineError(
            "the ACPI tables do not fit into their 64 KiB; give less, or use less devices."
        )
    return Tables(bytes(blob), base)
