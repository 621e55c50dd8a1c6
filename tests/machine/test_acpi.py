"""ACPI tables, checked by walking them the way a guest does."""

import shutil
import struct
import subprocess

import pytest

from trapline.base.errors import BadMachineError
from trapline.machine.devices import power
from trapline.machine.loader import aml, gpamap
from trapline.machine.loader.acpi import Board, table, tables
from trapline.machine.loader.acpifile import read_table


class Guest:
    """Follows RSDP and XSDT and checks every checksum on the way."""

    def __init__(self, board):
        result = tables(board)
        self.base, self.data = gpamap.ACPI_TABLES, result.data
        self.root = self.at(result.rsdp, 36)
        self.tables = {}
        (xsdt,) = struct.unpack_from("<Q", self.root, 24)
        body = self.table(xsdt)[36:]
        for (address,) in struct.iter_unpack("<Q", body):
            found = self.table(address)
            self.tables[found[:4].decode()] = found
        (dsdt,) = struct.unpack_from("<Q", self.tables["FACP"], 140)
        self.tables["DSDT"] = self.table(dsdt)

    def at(self, address, size):
        return self.data[address - self.base : address - self.base + size]

    def table(self, address):
        (size,) = struct.unpack("<I", self.at(address + 4, 4))
        data = self.at(address, size)
        assert len(data) == size
        assert sum(data) & 0xFF == 0
        return data


def test_the_root_pointer_has_both_checksums():
    guest = Guest(Board())
    assert guest.root[:8] == b"RSD PTR "
    assert sum(guest.root[:20]) & 0xFF == 0
    assert sum(guest.root) & 0xFF == 0


def test_a_plain_board_has_one_processor_and_nothing_else():
    guest = Guest(Board())
    assert set(guest.tables) == {"FACP", "APIC", "DSDT"}
    madt = guest.tables["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 0)  # no 8259
    assert madt[44:] == bytes([0, 8, 0, 0, 1, 0, 0, 0])


def test_the_fadt_names_the_power_registers():
    fadt = Guest(Board()).tables["FACP"]
    assert len(fadt) == 276
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags >> 20 & 1  # hardware-reduced
    assert flags >> 10 & 1  # reset register
    ports = [struct.unpack_from("<BBBBQ", fadt, offset) for offset in (116, 244, 256)]
    assert [port[0] for port in ports] == [1, 1, 1]
    assert [port[4] - power.PORT for port in ports] == [
        power.Register.RESET,
        power.Register.SLEEP_CONTROL,
        power.Register.SLEEP_STATUS,
    ]
    assert fadt[128] == power.RESET_VALUE


def test_options_add_an_ioapic_and_an_hpet():
    guest = Guest(Board(ioapic=True, hpet=True))
    ioapic = guest.tables["APIC"][52:]
    assert struct.unpack("<BBBBII", ioapic) == (1, 12, 1, 0, 0xFEC00000, 0)
    (address,) = struct.unpack_from("<Q", guest.tables["HPET"], 44)
    assert address == 0xFED00000
    dsdt = guest.tables["DSDT"]
    assert aml.eisa_id("PNP0103") in dsdt
    assert aml.interrupt(4) in dsdt


def test_a_memory_mapped_serial_port_is_a_second_one():
    dsdt = Guest(Board(mmio_uart=True)).tables["DSDT"]
    assert dsdt.count(aml.eisa_id("PNP0501")) == 2
    assert aml.fixed_memory(0xFED80000, 8) in dsdt
    assert aml.fixed_memory(0xFED80000, 8) not in Guest(Board()).tables["DSDT"]


def test_the_dsdt_names_devices_and_the_soft_off_state():
    dsdt = Guest(Board()).tables["DSDT"]
    assert dsdt.count(b"\x5b\x82") == 2
    assert b"\x08\\_S5_\x12" in dsdt
    assert aml.io_ports(0x3F8, 8) in dsdt
    assert aml.eisa_id("PNP0103") not in dsdt


def test_eisa_ids_are_compressed_as_acpi_says():
    assert aml.eisa_id("PNP0501") == bytes.fromhex("0c41d00501")
    assert aml.eisa_id("PNP0C0F") == bytes.fromhex("0c41d00c0f")


@pytest.mark.parametrize(
    ("payload", "encoded"),
    [
        (0, "01"),
        (62, "3f"),
        (63, "4104"),  # 65 bytes in all: low nibble 1, then 4
        (0xFFD, "4fff"),
        (0xFFE, "810001"),
        (0xFFFFC, "8fffff"),
        (0xFFFFD, "c1000001"),
    ],
)
def test_package_lengths_count_themselves(payload, encoded):
    assert aml.package_length(payload).hex() == encoded


@pytest.mark.parametrize(
    ("value", "encoded"),
    [(0, "00"), (1, "01"), (2, "0a02"), (0x100, "0b0001"), (0x10000, "0c00000100")],
)
def test_integers_take_their_shortest_form(value, encoded):
    assert aml.integer(value).hex() == encoded


def given(signature, *members, revision=2):
    return table(signature, revision, aml.scope("\\_SB", *members))


def test_the_users_tables_are_beside_ours_or_in_their_place():
    extra = given(b"SSDT", aml.name("AAAA", aml.integer(1)))
    more = given(b"SSDT", aml.name("BBBB", aml.integer(2)))
    dsdt = given(b"DSDT", aml.name("CCCC", aml.integer(3)))
    other = table(b"SVKL", 1, b"key")
    guest = Guest(Board(tables=(extra, dsdt, more, other)))
    assert guest.tables["DSDT"] == dsdt
    assert guest.tables["SVKL"] == other
    assert set(guest.tables) == {"FACP", "APIC", "DSDT", "SSDT", "SVKL"}
    assert extra in guest.data
    assert more in guest.data
    assert set(Guest(Board()).tables) == {"FACP", "APIC", "DSDT"}


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(BadMachineError, match="64 KiB"):
        tables(Board(tables=(table(b"SSDT", 2, bytes(0xFF00)),)))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no ACPI table"),
        (b"DefinitionBlock (", "no ACPI table"),
        (table(b"SSDT", 2, b"x")[:-1], "its header says"),
        (table(b"SSDT", 2, b"x") * 2, "its header says"),
        (table(b"FACP", 6, bytes(240)), "made here"),
        (bytes(1 << 17), "too large"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, data, says):
    path = tmp_path / "table.aml"
    path.write_bytes(data)
    with pytest.raises(BadMachineError, match=says):
        read_table(path)


def test_what_iasl_compiles_is_taken(tmp_path):
    if shutil.which("iasl") is None:
        pytest.skip("acpica-tools is not installed")
    source = tmp_path / "one.asl"
    source.write_text('DefinitionBlock ("", "SSDT", 2, "ME", "ONE", 1) { Name (AAAA, 1) }\n')
    subprocess.run(["iasl", str(source)], cwd=tmp_path, check=True, capture_output=True)
    data = read_table(tmp_path / "one.aml")
    assert Guest(Board(tables=(data,))).tables["SSDT"] == data
