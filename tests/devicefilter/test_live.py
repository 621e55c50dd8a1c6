"""`filter live` on trees of files that stand for machines."""

import os

import pytest

from trapline.allowlist.listfile import load
from trapline.cli.main import run
from trapline.devicefilter.live import inspect

BLK = "pci:v00001AF4d00001042sv00001AF4sd00001100bc01sc80i00"
E1000 = "pci:v00008086d0000100Esv00001AF4sd00001100bc02sc00i00"
CLOCKS = "sys/devices/system/clocksource/clocksource0"


@pytest.fixture
def td(tmp_path):
    """A TD as it should be."""
    files = {
        "proc/cpuinfo": "flags : fpu tdx_guest\n",
        "proc/interrupts": "  24:  1  PCI-MSIX-0000:00:02.0 0-edge virtio0\n",
        f"{CLOCKS}/available_clocksource": "tsc\n",
        f"{CLOCKS}/current_clocksource": "tsc\n",
        "sys/kernel/debug/swiotlb/io_tlb_nslabs": "32768\n",
        "sys/kernel/debug/swiotlb/io_tlb_used": "4\n",
        "sys/firmware/acpi/tables/FACP": "",
        "sys/firmware/acpi/tables/DSDT": "",
        "sys/firmware/acpi/tables/APIC": "",
        "sys/bus/pci/devices/0000:00:02.0/modalias": BLK + "\n",
        "sys/bus/pci/devices/0000:00:03.0/modalias": E1000 + "\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    bind(tmp_path, "0000:00:02.0", "virtio-pci")
    return tmp_path


def bind(root, device, driver):
    place = root / "sys/bus/pci/drivers" / driver
    place.mkdir(parents=True, exist_ok=True)
    (root / "sys/bus/pci/devices" / device / "driver").symlink_to(place)


def standing(root):
    return {check.name: check.standing for check in inspect(root, load()).checks}


def test_a_td_as_it_should_be_passes(td):
    result = inspect(td, load())
    assert result.is_td
    assert set(standing(td).values()) == {"ok"}
    assert [(d.name, d.driver, d.allowed) for d in result.devices] == [
        ("0000:00:02.0", "virtio-pci", "1af4:1042"),
        ("0000:00:03.0", None, None),
    ]
    (shared,) = (check for check in result.checks if check.name == "shared memory")
    assert shared.found == "64 MiB, 8 KiB in use"
    assert run(["filter", "live", "--root", str(td)]) == 0


@pytest.mark.parametrize(
    ("name", "file", "text"),
    [
        ("IO-APIC", "proc/interrupts", " 4: 1 IO-APIC 4-edge ttyS0\n"),
        ("HPET", f"{CLOCKS}/available_clocksource", "tsc hpet\n"),
        ("HPET", "sys/firmware/acpi/tables/HPET", ""),
        ("clock source", f"{CLOCKS}/current_clocksource", "acpi_pm\n"),
        ("clock source", f"{CLOCKS}/current_clocksource", "kvm-clock\n"),
        ("shared memory", "sys/kernel/debug/swiotlb/io_tlb_nslabs", "0\n"),
    ],
)
def test_each_fault_is_found(td, name, file, text):
    (td / file).write_text(text)
    assert standing(td)[name] == "finding"
    assert run(["filter", "live", "--root", str(td)]) == 1


def test_a_driver_on_an_unlisted_device_is_found(td, capsys):
    bind(td, "0000:00:03.0", "e1000")
    assert run(["filter", "live", "--root", str(td)]) == 1
    text = capsys.readouterr().out
    assert "e1000 (0000:00:03.0)" in text
    assert max(map(len, text.splitlines())) <= 80


def test_more_acpi_tables_than_needed_are_noted(td):
    (td / "sys/firmware/acpi/tables/SSDT1").write_text("")
    assert standing(td)["ACPI tables"] == "note"


def test_an_empty_machine_is_unknown_and_no_error(tmp_path):
    (tmp_path / "sys/bus").mkdir(parents=True)
    found = standing(tmp_path)
    assert found["TD"] == found["IO-APIC"] == found["clock source"] == "note"
    assert found["bound drivers"] == found["HPET"] == "note"
    assert "finding" not in found.values()


def test_no_machine_at_all_is_no_clean_one(tmp_path, capsys):
    assert run(["filter", "live", "--root", str(tmp_path / "nowhere")]) == 2
    assert "there is no sys/bus" in capsys.readouterr().err


def test_a_pipe_in_a_copy_is_not_waited_for(td):
    (td / "proc/cpuinfo").unlink()
    os.mkfifo(td / "proc/cpuinfo")
    assert standing(td)["TD"] == "note"


def test_hostile_names_do_not_reach_the_terminal(td, capsys):
    place = td / "sys/bus/pci/devices/0000:00:04.0\x1b[2J"
    place.mkdir()
    (place / "modalias").write_bytes(b"\xff\x1b" * 1000)
    run(["filter", "live", "--root", str(td)])
    assert "\x1b" not in capsys.readouterr().out
