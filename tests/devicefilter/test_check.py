"""What an allow list means for a kernel, from small scan documents."""

import dataclasses

import msgspec
import pytest

from reports import rendered
from scan_documents import document, driver, mapping, site
from trapline.allowlist import listfile
from trapline.allowlist.entries import AllowEntry, AllowList, parse_id
from trapline.devicefilter.check import check
from trapline.results.filter import FilterResult, Reach
from trapline.scan.wholekernel import scan

VIRTIO_PCI = driver(
    name="virtio_pci",
    bus="pci",
    module="vmlinux",
    builtin=True,
    aliases=("pci:v00001AF4d*sv*sd*bc*sc*i*",),
    allowed=True,
)
VIRTIO_NET = driver(name="virtio_net", bus="virtio", aliases=("virtio:d00000001v*",))
VIRTIO_RNG = driver(name="virtio_rng", bus="virtio", aliases=("virtio:d00000004v*",))
TRANSPORT = driver(name="virtio_pci_modern_dev", bus="", module="vmlinux", builtin=True, aliases=())
NVME = driver(
    name="nvme",
    bus="pci",
    module="vmlinux",
    builtin=True,
    aliases=("pci:v*d*sv*sd*bc01sc08i02*",),
    allowed=False,
)
UART = driver(name="8250", bus="acpi", module="vmlinux", builtin=True, aliases=("acpi*:PNP0501:*",))
E1000 = driver(name="e1000", bus="pci", aliases=("pci:v00008086d0000100Esv*sd*bc*sc*i*",))
DRIVERS = (VIRTIO_PCI, VIRTIO_NET, VIRTIO_RNG, TRANSPORT, NVME, UART, E1000)


def sites_of(name, count, **changes):
    return tuple(site(driver=name, **changes) for _ in range(count))


def kernel(drivers=DRIVERS, sites=(), mappings=()):
    return document(drivers=drivers, sites=sites, mappings=mappings)


def allow_list(*ids):
    entries = tuple(AllowEntry(i, f"name of {i}", None, parse_id(i)) for i in ids)
    return AllowList("our list", "test", entries)


def verdicts(result):
    return {d.name: d.verdict for d in result.drivers}


def text(result):
    return rendered(result).decode("ascii")


def test_verdicts():
    found = verdicts(check(kernel(), allow_list("1af4:1000")))
    assert found == {
        "virtio_pci": "allowed",
        "virtio_net": "allowed",
        "virtio_rng": "loophole",
        "virtio_pci_modern_dev": "outside",
        "nvme": "loophole",
        "8250": "outside",
        "e1000": "outside",
    }


def test_the_list_given_counts_and_not_the_one_of_the_scan():
    result = check(kernel(), allow_list("8086:100e"))
    assert verdicts(result)["e1000"] == "allowed"
    assert verdicts(result)["virtio_pci"] == "outside"
    assert [entry.id for entry in result.allow] == ["8086:100e"]


def test_a_built_in_driver_that_touches_the_host_is_a_finding():
    bad = kernel(sites=sites_of("nvme", 2) + sites_of("8250", 1, trap="pio"))
    assert check(bad, allow_list("1af4:1041")).findings == ("8250", "nvme")
    assert check(bad, allow_list("1af4:1041", "class:0108")).findings == ("8250",)


def test_what_is_no_finding():
    # Modules are not there until something loads them; the transport serves what is let in;
    # a driver without a place that traps touches nothing.
    quiet = kernel(
        sites=sites_of("e1000", 3)
        + sites_of("virtio_pci", 3)
        + sites_of("virtio_pci_modern_dev", 3)
        + sites_of(None, 3)
    )
    assert check(quiet, allow_list("1af4:1041")).findings == ()


def test_a_mapping_alone_is_a_touch():
    found = check(kernel(mappings=(mapping(driver="8250"),)), allow_list("1af4:1041"))
    assert found.findings == ("8250",)


def test_reach_counts_by_kind():
    sites = (
        *sites_of("nvme", 1),
        *sites_of("nvme", 2, form="call"),
        *sites_of("nvme", 3, trap="pio"),
        *sites_of("nvme", 4, trap="msr"),
    )
    result = check(kernel(sites=sites, mappings=(mapping(driver="nvme"),)), allow_list())
    (nvme,) = [d for d in result.drivers if d.name == "nvme"]
    assert nvme.reach == Reach(mmio=1, calls=2, pio=3, other=4, mappings=1)
    assert nvme.reach.total == 11


def test_what_acts_for_drivers_that_are_let_in():
    sites = (
        *sites_of("virtio_pci_modern_dev", 5, form="call"),
        *sites_of(None, 7, subsystem="PCI MSI"),
        *sites_of(None, 9, subsystem="HPET"),
    )
    shared = {s.name: s.reach for s in check(kernel(sites=sites), allow_list("1af4:1041")).shared}
    assert shared["virtio_pci_modern_dev"].calls == 5
    assert shared["PCI MSI"].mmio == 7
    assert "HPET" not in shared
    assert check(kernel(sites=sites), allow_list()).shared == ()


def test_ids_without_a_driver_are_named():
    result = check(kernel(), allow_list("1af4:1041", "1af4:1049", "10ec:8139", "virtio:1"))
    assert result.unused == ("1af4:1049", "10ec:8139")
    assert "no driver in this kernel: 1af4:1049, 10ec:8139." in text(result)


def test_early_is_built_in_and_bound_to_devices():
    early = {d.name for d in check(kernel(), allow_list()).drivers if d.early}
    assert early == {"virtio_pci", "nvme", "8250"}


def test_the_document_survives_json():
    result = check(kernel(sites=sites_of("nvme", 2)), allow_list("1af4:1000"))
    data = msgspec.json.encode(result)
    assert data.startswith(b'{"schema":"trapline/filter","version":1,')
    assert msgspec.json.decode(data, type=FilterResult) == result


def test_text_fits_a_mail_and_names_what_matters():
    result = check(
        kernel(sites=sites_of("nvme", 2) + sites_of("8250", 1, trap="pio")),
        allow_list("1af4:1000"),
    )
    report = text(result)
    assert max(map(len, report.splitlines())) <= 80
    assert "1af4:1000 -> virtio_pci -> virtio:1 -> virtio_net" in report
    assert "1af4:1000 with class 010802 -> nvme" in report
    assert "1af4:1000 with subsystem id 4" in report
    assert "2 built-in drivers outside the list that touch the host: 8250, nvme." in report


def test_text_of_a_kernel_with_nothing_to_say():
    report = text(check(kernel(drivers=()), allow_list("1af4:1000")))
    assert "nothing found against it" in report
    assert report.count("None.") == 2


def test_hostile_names_cannot_drive_a_terminal():
    nasty = msgspec.structs.replace(NVME, name="nv\x1b[31mme\n\u202e")
    report = text(check(kernel(drivers=(nasty, VIRTIO_PCI)), allow_list("1af4:1000")))
    assert "\x1b" not in report
    assert "nv\\x1b[31mme" in report


def test_a_list_as_text():
    everything = allow_list(
        "1af4:1000", "1af4:*", "class:0c03", "virtio:26", "virtio:*", "1af4:1006"
    )
    report = rendered(everything).decode("ascii")
    assert max(map(len, report.splitlines())) <= 80
    for words in ("virtio:26", "any virtio device", "any device of the", "no virtio device"):
        assert words in " ".join(report.split())
    assert "subsystem id, which the host chooses" in " ".join(report.split())
    modern = rendered(allow_list("1af4:1041")).decode("ascii")
    assert "subsystem id" not in modern


@pytest.mark.kernel
def test_the_default_list_on_a_real_kernel(debian_kernel):
    allow = listfile.load()
    files = dataclasses.replace(debian_kernel, modules=())
    result = check(scan(files, allow, workers=1), allow)
    found = {d.name: d for d in result.drivers}
    assert found["virtio_pci"].verdict == "allowed"
    assert found["virtio_console"].verdict == "allowed"
    assert found["nvme"].verdict == "loophole"
    assert {"nvme", "8250_pci", "i8042"} <= set(result.findings)
    assert found["nvme"].reach.mmio > 0
    assert {s.name for s in result.shared if s.reach.total} >= {"virtio_pci_modern_dev", "PCI MSI"}
