"""What `filter export` writes: on a tree of files, and in a TD with a stock kernel."""

import os
import re
import shutil
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from devices_guest import Guest
from scan_documents import document, driver, site
from trapline.allowlist.listfile import load, parse
from trapline.base.errors import OutputError
from trapline.devicefilter import export
from trapline.devicefilter.check import check
from trapline.machine.qemu import process

NVME = "pci:v*d*sv*sd*bc01sc08i02*"
BLK = "pci:v00001AF4d00001042sv00001AF4sd00001100bc01sc80i00"
NET = "pci:v00001AF4d00001041sv00001AF4sd00001100bc02sc00i00"
# Its class says bridge, its subsystem id holds the digits of a class.
DRESSED_UP = "pci:v00008086d0000100Esv0000BC06sd00001100bc06sc04i00"


def one(identity, name="a disk"):
    text = (
        'schema = "trapline/allow-list"\nversion = 1\ntitle = "one"\n'
        f'[[allow]]\nid = "{identity}"\nname = "{name}"\n'
    )
    return parse(text.encode(), "test")


class Sysfs:
    """A tree that takes writes as sysfs does, though nothing happens."""

    def __init__(self, folder):
        self.root = folder / "sys"
        self.bus = self.root / "bus" / "pci"
        self.bus.mkdir(parents=True)
        for name in ("drivers_autoprobe", "drivers_probe"):
            (self.bus / name).write_text("1\n")

    def add(self, name, modalias, *, bound):
        device = self.bus / "devices" / name
        device.mkdir(parents=True)
        (device / "modalias").write_text(modalias + "\n")
        if bound:
            (device / "driver").mkdir()
            (device / "driver" / "unbind").write_text("")
        return device


def run(folder, allow, *words):
    script = folder / "device-filter"
    script.write_text(export.files(allow)[export.SCRIPT])
    script.chmod(0o755)
    return subprocess.run(
        [str(script), *words],
        env={**os.environ, "SYS": str(folder / "sys")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def sysfs(tmp_path):
    return Sysfs(tmp_path)


def test_lock_turns_probing_off_unbinds_and_binds(sysfs, tmp_path):
    listed = sysfs.add("0000:00:02.0", BLK, bound=False)
    stranger = sysfs.add("0000:00:03.0", NET, bound=True)
    bridge = sysfs.add("0000:00:04.0", DRESSED_UP, bound=True)
    done = run(tmp_path, one("1af4:1042"), "lock")
    assert (done.returncode, done.stderr) == (0, "")
    assert (sysfs.bus / "drivers_autoprobe").read_text() == "0\n"
    assert (sysfs.bus / "drivers_probe").read_text() == "0000:00:02.0\n"
    assert (stranger / "driver" / "unbind").read_text() == "0000:00:03.0\n"
    assert (bridge / "driver" / "unbind").read_text() == "0000:00:04.0\n"
    assert not (listed / "driver").exists()


def test_probe_binds_what_is_listed_and_unbinds_all_else(sysfs, tmp_path):
    listed = sysfs.add("0000:00:02.0", BLK, bound=False)
    stranger = sysfs.add("0000:00:03.0", NET, bound=True)
    run(tmp_path, one("1af4:1042"), "probe", str(stranger), "pci")
    assert (sysfs.bus / "drivers_probe").read_text() == "1\n"
    assert (stranger / "driver" / "unbind").read_text() == "0000:00:03.0\n"
    run(tmp_path, one("1af4:1042"), "probe", str(listed), "pci")
    assert (sysfs.bus / "drivers_probe").read_text() == "0000:00:02.0\n"
    gone = run(tmp_path, one("1af4:1042"), "probe", str(listed.parent / "gone"), "pci")
    assert (gone.returncode, gone.stderr) == (0, "")


@pytest.mark.parametrize("words", [["lock"], ["probe", "{device}", "pci"]])
def test_a_driver_is_loaded_before_its_device_is_bound(sysfs, tmp_path, monkeypatch, words):
    """Loaded later it would bind nothing, as nothing is probed automatically."""
    device = sysfs.add("0000:00:02.0", BLK, bound=False)
    sysfs.add("0000:00:03.0", NET, bound=False)
    tools = tmp_path / "bin"
    tools.mkdir()
    modprobe = tools / "modprobe"
    modprobe.write_text(
        '#!/bin/sh\n[ "$1 $2" = "-q -b" ] || exit 1\n'
        f'echo "$3 $(cat {sysfs.bus}/drivers_probe)" >> {tmp_path}/loaded\n'
    )
    modprobe.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    run(tmp_path, one("1af4:1042"), *(word.format(device=device) for word in words))
    loaded = (tmp_path / "loaded").read_text().splitlines()
    assert loaded[0] == f"{BLK} 1"
    assert not [line for line in loaded if NET in line]
    assert (sysfs.bus / "drivers_probe").read_text() == "0000:00:02.0\n"


def test_list_names_each_device(sysfs, tmp_path):
    sysfs.add("0000:00:02.0", BLK, bound=True)
    sysfs.add("0000:00:03.0", NET, bound=False)
    assert run(tmp_path, one("1af4:1042"), "list").stdout.splitlines() == [
        "pci 0000:00:02.0 listed bound",
        "pci 0000:00:03.0 unlisted unbound",
    ]


def obey(rules, **event):
    """Evaluate the part of udev's language that the rules use; returns (event, RUN)."""
    lines = [line for line in rules.splitlines() if line and not line.startswith("#")]
    at, programs = 0, []
    while at < len(lines):
        terms = [
            re.fullmatch(r'(?:ENV\{)?(\w+)\}?(==|!=|=|\+=)"(.*)"', term).groups()
            for term in lines[at].split(", ")
        ]
        at += 1
        for key, operator, value in terms:
            if operator in {"==", "!="}:
                matches = any(fnmatchcase(event.get(key, ""), one) for one in value.split("|"))
                if matches != (operator == "=="):
                    break
            elif key == "GOTO":
                at = next(n for n, line in enumerate(lines) if line == f'LABEL="{value}"')
            elif key == "RUN":
                programs.append(value)
            elif key != "LABEL":
                event[key] = value
    return event, programs


@pytest.mark.parametrize("action", ["add", "change", "bind", "unbind"])
def test_udev_loads_nothing_for_an_unlisted_device(action):
    """A PCI device that is plugged in gets a driver behind the back of drivers_autoprobe."""
    rules = export.files(one("1af4:1042"))["etc/udev/rules.d/50-trapline.rules"]
    event, programs = obey(rules, ACTION=action, SUBSYSTEM="pci", MODALIAS=NET)
    assert event["MODALIAS"] == ""
    assert bool(programs) == (action in {"add", "bind"})
    event, programs = obey(rules, ACTION=action, SUBSYSTEM="pci", MODALIAS=BLK)
    assert event["MODALIAS"] == BLK
    assert bool(programs) == (action == "add")
    event, programs = obey(rules, ACTION=action, SUBSYSTEM="usb", MODALIAS="usb:v1")
    assert event["MODALIAS"] == "usb:v1"
    assert not programs


def test_other_words_are_refused(tmp_path):
    done = run(tmp_path, load(), "open")
    assert done.returncode == 2
    assert "usage" in done.stderr


@pytest.mark.parametrize("name", ["$(touch pwned)", "`id`", "a) ;; esac; id #", "{x}", "a'b"])
def test_names_of_a_list_are_no_code(tmp_path, sysfs, name):
    sysfs.add("0000:00:02.0", BLK, bound=True)
    done = run(tmp_path, one("1af4:1042", name), "list")
    assert done.stdout == "pci 0000:00:02.0 listed bound\n"
    assert done.stderr == ""


def test_virtio_entries_filter_that_bus_too():
    assert "for bus in pci virtio;" in export.files(one("virtio:2"))[export.SCRIPT]
    assert "for bus in pci;" in export.files(one("1af4:1042"))[export.SCRIPT]


def test_all_scripts_are_shell():
    for name, text in export.files(load()).items():
        if text.startswith("#!"):
            subprocess.run(["sh", "-n"], input=text, text=True, check=True)
            assert name in export._EXECUTABLE


def test_initcalls_are_found_by_module():
    symbols = [
        "__initcall__kmod_virtio_pci__580_823_virtio_pci_driver_init6",
        "__initcall__kmod_xenbus__785_854_xenbus_probe_initcall6",
        "__initcall__kmod_xenbus__785_854_xenbus_late7s",
        "virtio_pci_driver_init",
    ]
    assert export.initcalls(symbols, ["virtio-pci"]) == ("virtio_pci_driver_init",)
    assert export.initcalls(symbols, ["xenbus"]) == ("xenbus_late", "xenbus_probe_initcall")
    line = export.files(load(), None, ("a_init", "b_init"))["kernel-command-line"]
    assert line == "hpet=disable initcall_blacklist=a_init,b_init\n"


def test_only_pci_drivers_are_kept_from_starting():
    drivers = (
        driver(name="nvme", bus="pci", module="vmlinux", builtin=True, aliases=(NVME,)),
        driver(
            name="acpi", bus="acpi", module="vmlinux", builtin=True, aliases=("acpi*:PNP0A03:*",)
        ),
        driver(name="e1000", bus="pci", aliases=("pci:v00008086d0000100Esv*sd*bc*sc*i*",)),
    )
    sites = (
        site(id="a", driver="nvme", module="vmlinux"),
        site(id="b", driver="acpi", module="vmlinux"),
        site(id="c", driver="e1000", module="e1000"),
    )
    checked = check(document(drivers=drivers, sites=sites), one("1af4:1042"))
    assert set(checked.findings) == {"nvme", "acpi"}
    assert export.early(checked) == ("nvme",)
    assert export.outside(checked) == ("e1000",)
    assert "blacklist e1000\n" in export.files(load(), checked)["etc/modprobe.d/trapline.conf"]


def test_nothing_is_overwritten(tmp_path):
    folder = tmp_path / "out"
    export.write(export.files(load()), folder)
    assert os.access(folder / export.SCRIPT, os.X_OK)
    with pytest.raises(OutputError, match="is not empty"):
        export.write(export.files(load()), folder)
    with pytest.raises(OutputError, match="cannot be written"):
        export.write(export.files(load()), Path("/proc/nowhere"))


@pytest.mark.kernel
@pytest.mark.skipif(
    shutil.which(process.EXECUTABLE) is None, reason="qemu-system-x86 is not installed"
)
def test_an_unlisted_device_stays_unbound_in_a_td(debian_kernel, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(b"sector" * 1000)
    script = export.files(one("1af4:1042"))[export.SCRIPT]
    commands = (
        f"busybox ln -s busybox /bin/sh\nbusybox cat > /filter << 'END_OF_FILTER'\n{script}"
        "END_OF_FILTER\n"
        'for line in $(busybox sh /filter list | busybox tr " " "_"); do say "before $line"; done\n'
        "busybox sh /filter lock\n"
        'for line in $(busybox sh /filter list | busybox tr " " "_"); do say "after $line"; done\n'
        'say "disk $(busybox head -c 6 /dev/vda)"\n'
        'say "interfaces $(busybox ls /sys/class/net)"\n'
    )
    guest = Guest(
        debian_kernel,
        commands,
        [f"blk,file={image}", "net"],
        ("virtio_blk", "virtio_net"),
        symbols=True,
    )
    # virtio-pci is built in: it had the card before anything in user space could say no.
    assert "before pci_0000:00:03.0_unlisted_bound" in guest.lines
    assert "after pci_0000:00:03.0_unlisted_unbound" in guest.lines
    assert "after pci_0000:00:02.0_listed_bound" in guest.lines
    assert "disk sector" in guest.lines
    assert "interfaces lo" in guest.lines
    drivers = {device.id: device.drivers for device in guest.result.devices}
    assert drivers == {"1af4:1042": ("virtio-pci", "virtio_blk"), "1af4:1041": ()}
