"""The exported files where they belong: Debian's initramfs-tools, udev and kmod, in a TD."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from debian_guest import PATH, Machine, environment, lacking

from devices_guest import Guest
from trapline.allowlist.listfile import parse
from trapline.devicefilter import export
from trapline.devicefilter.check import check
from trapline.kernel.binary import Binary
from trapline.machine.outcome import OutcomeKind
from trapline.machine.qemu import process

LIST = b"""\
schema = "trapline/allow-list"
version = 1
title = "disks"
[[allow]]
id = "1af4:1042"
name = "a disk"
"""
RULES = "etc/udev/rules.d/50-trapline.rules"
DISK, DATA, CARD, STRANGER, NVME = (f"0000:00:{slot:02x}.0" for slot in range(2, 7))
# When the guest says how things stand: what the initramfs left, after udev's cold plug, after
# devices were plugged in again, then without modprobe's blacklist, with a driver of an unlisted
# device loaded by name, and with devices plugged in that it could have.
STATES = ("initramfs", "udev", "plugged", "again", "loaded", "late")
# What the root file system's init does, after an initramfs has found and mounted it.
INIT = f"""\
#!/usr/bin/busybox sh
export PATH=/usr/sbin:/usr/bin
say() {{ echo "init: $*"; }}
state() {{
  for device in /sys/bus/pci/devices/*; do
    driver=none
    [ -e $device/driver ] && driver=$(readlink $device/driver) && driver=${{driver##*/}}
    say "$1 ${{device##*/}} $driver"
  done
  say "$1 disks $(cd /sys/block && echo vd*)"
  say "$1 modules" $(cut -d" " -f1 /proc/modules)
}}
plug() {{
  for device in {DATA} {CARD} {STRANGER}; do
    echo 1 > /sys/bus/pci/devices/$device/remove
  done
  echo 1 > /sys/bus/pci/rescan
  udevadm settle
}}
[ -e /sys/bus/pci/drivers/nvme ] && say "nvme driver" || say "nvme no driver"
state initramfs
/usr/lib/systemd/systemd-udevd --daemon --resolve-names=never
udevadm trigger --type=subsystems --action=add
udevadm trigger --type=devices --action=add
udevadm settle
state udev
for device in {DISK} {CARD}; do
  tested=$(udevadm test /sys/bus/pci/devices/$device 2> /dev/null)
  has=no
  echo "$tested" | grep -q "^ *MODALIAS=pci:" && has=a
  say "$device has $has MODALIAS"
  say "udevadm test $device" $(echo "$tested" | sed -n "s|.*/device-filter ||p" | tr -d "'")
done
plug
state plugged
mount -t tmpfs tmpfs /etc/modprobe.d
udevadm control --reload
plug
state again
modprobe vmxnet3
state loaded
plug
state late
stty -F /dev/console sane
sleep 0.3
poweroff -f
"""

needs_qemu = pytest.mark.skipif(
    shutil.which(process.EXECUTABLE) is None, reason="qemu-system-x86 is not installed"
)
needs_debian = pytest.mark.skipif(bool(lacking()), reason=lacking() or "all is there")


@pytest.fixture
def machine(debian_kernel, tmp_path):
    folder = tmp_path / "machine"
    yield Machine(folder, debian_kernel)
    shutil.rmtree(folder)  # some 300 MB


def boot(machine, kernel, exported):
    """Boot Debian's initramfs and a root disk with these files; returns the tree and the guest."""
    image, tree = machine.initramfs(exported, most=os.environ.get("TRAPLINE_INITRAMFS") == "most")
    disk = machine.root(tree, exported, INIT)
    data = machine.folder / "data.img"
    data.write_bytes(b"sector" * 1000)
    line = exported.get("kernel-command-line", "").strip()
    guest = Guest(
        kernel,
        "",
        [f"blk,file={disk}", f"blk,file={data}", "net", "qemu:vmxnet3", "qemu:nvme,serial=1"],
        (),
        initrd=image,
        memory=1 << 30,
        append=(f"root=/dev/vda ro fsck.mode=skip panic=-1 {line}",),
    )
    assert guest.outcome.kind == OutcomeKind.POWERED_OFF, guest.console.decode(errors="replace")
    return tree, guest


def modules(guest, when):
    (line,) = (line for line in guest.lines if line.startswith(f"{when} modules"))
    return line.split()[2:]


@pytest.mark.kernel
@needs_qemu
@needs_debian
def test_only_what_is_listed_is_bound(machine, debian_kernel, debian_scan):
    allow = parse(LIST, "test")
    checked = check(debian_scan, allow)
    with Binary.open_vmlinux(debian_kernel.vmlinux) as vmlinux:
        blocked = export.initcalls(vmlinux.symbols.names, export.early(checked))
    exported = export.files(allow, checked, blocked)
    tree, guest = boot(machine, debian_kernel, exported)
    order = (tree / "scripts/init-top/ORDER").read_text()
    assert order.index("/scripts/init-top/trapline") < order.index("/scripts/init-top/udev")
    assert (tree / "usr/lib/udev/rules.d" / Path(RULES).name).read_text() == exported[RULES]
    assert "nvme no driver" in guest.lines, "its initcall was to be left out"
    for when in STATES:
        for device in (DISK, DATA):
            assert f"{when} {device} virtio-pci" in guest.lines
        for device in (CARD, STRANGER, NVME):
            assert f"{when} {device} none" in guest.lines
        assert f"{when} disks vda vdb" in guest.lines
        assert "virtio_blk" in modules(guest, when)
        assert ("vmxnet3" in modules(guest, when)) == (when in {"loaded", "late"})
    assert f"{DISK} has a MODALIAS" in guest.lines
    assert f"{CARD} has no MODALIAS" in guest.lines
    for device in (DISK, CARD):
        path = f"/sys/devices/pci0000:00/{device}"
        assert f"udevadm test {device} probe {path} pci" in guest.lines


@pytest.mark.kernel
@needs_qemu
@needs_debian
def test_without_the_files_all_is_bound(machine, debian_kernel):
    _, guest = boot(machine, debian_kernel, {})
    drivers = ("virtio-pci", "virtio-pci", "virtio-pci", "vmxnet3", "nvme")
    assert "nvme driver" in guest.lines
    for when in STATES:
        for device, driver in zip((DISK, DATA, CARD, STRANGER, NVME), drivers, strict=True):
            assert f"{when} {device} {driver}" in guest.lines
        assert {"virtio_blk", "virtio_net", "vmxnet3"} < set(modules(guest, when))
    assert f"{CARD} has a MODALIAS" in guest.lines


def udev_can_verify():
    tool = shutil.which("udevadm", path=PATH)
    if tool is None:
        return False
    done = subprocess.run([tool, "verify", "--help"], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.skipif(not udev_can_verify(), reason="no udevadm with `verify` (systemd 254) here")
@pytest.mark.parametrize("identity", ["1af4:1042", "class:0c03", "virtio:2"])
def test_udev_finds_nothing_wrong_with_the_rules(identity, tmp_path):
    allow = parse(LIST.replace(b"1af4:1042", identity.encode()), "test")
    rules = tmp_path / "50-trapline.rules"
    rules.write_text(export.files(allow)[RULES])
    done = subprocess.run(
        ["udevadm", "verify", str(rules)], env=environment(), capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b""), done.stdout


@needs_qemu
def test_qemu_takes_the_arguments(tmp_path):
    """All devices that a list can name, on a machine that is stopped before it starts."""
    ids = ("1af4:1041", "1af4:1042", "1af4:1043", "1af4:1049", "8086:100e", "10ec:8139")
    text = LIST.decode().split("[[allow]]")[0]
    text += "".join(f'[[allow]]\nid = "{identity}"\nname = "x"\n' for identity in ids)
    line = export.files(parse(text.encode(), "test"))["qemu-arguments"]
    backs = ["-blockdev", "driver=null-co,read-zeroes=on,node-name=d0"]
    backs += ["-fsdev", f"local,id=f0,path={tmp_path},security_model=none"]
    for number in range(line.count("NETDEV")):
        line = line.replace("NETDEV", f"n{number}", 1)
        backs += ["-netdev", f"hubport,id=n{number},hubid={number}"]
    line = line.replace("drive=DRIVE", "drive=d0").replace("FSDEV", "f0").replace("TAG", "share")
    idle = ["-accel", "tcg", "-S", "-display", "none", "-monitor", "stdio"]
    done = subprocess.run(
        [process.EXECUTABLE, *backs, *line.split(), *idle],
        input="info pci\nquit\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for identity in ids:
        assert f"PCI device {identity}" in done.stdout, done.stderr
