"""Drivers that Debian's full flavour has as modules: 9p, e1000 and 8139cp. `make devices`."""

import hashlib
import os
import shutil

import pytest
from test_devices_debian import BODY, Server

from devices_guest import Guest
from trapline.kernel.find.locate import locate
from trapline.machine.outcome import OutcomeKind
from trapline.machine.qemu import process

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        "TRAPLINE_FULL_KERNEL" not in os.environ,
        reason="TRAPLINE_FULL_KERNEL names no kernel of the full flavour; see `make devices`",
    ),
    pytest.mark.skipif(
        shutil.which(process.EXECUTABLE) is None, reason="qemu-system-x86 is not installed"
    ),
]

SHARE = """
busybox mkdir /p
busybox mount -t 9p -o trans=virtio,version=9p2000.L,msize=65536 share /p
say "read $(busybox sha256sum /p/from-host)"
echo "from the guest" > /p/from-guest
busybox sync
busybox umount /p
say "unmounted"
"""
NETWORK = """
busybox ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
for second in 1 2 3 4 5 6 7 8 9 10; do
  [ "$(busybox cat /sys/class/net/eth0/carrier)" = 1 ] && break
  busybox sleep 1
done
say "page $(busybox wget -q -O - http://10.0.2.2:{port}/page | busybox sha256sum)"
say "level $(busybox grep -c IO-APIC.*fasteoi /proc/interrupts)"
"""


@pytest.fixture(scope="module")
def full_kernel():
    return locate(os.environ["TRAPLINE_FULL_KERNEL"])


def test_a_share_is_read_and_written(full_kernel, tmp_path):
    data = os.urandom(300_000)
    (tmp_path / "from-host").write_bytes(data)
    guest = Guest(
        full_kernel,
        SHARE,
        [f"9p,share={tmp_path},write=on"],
        ("9pnet_virtio", "9p"),
    )
    assert guest.outcome.kind == OutcomeKind.POWERED_OFF, guest.console
    assert f"read {hashlib.sha256(data).hexdigest()}  /p/from-host" in guest.lines
    assert (tmp_path / "from-guest").read_text() == "from the guest\n"
    assert "unmounted" in guest.lines
    assert guest.refused == []


@pytest.mark.parametrize(("device", "module"), [("e1000", "e1000"), ("rtl8139", "8139cp")])
def test_a_page_is_fetched_through_an_intx_card(full_kernel, device, module):
    with Server() as server:
        guest = Guest(full_kernel, NETWORK.format(port=server.port), [device], (module,))
    assert guest.outcome.kind == OutcomeKind.POWERED_OFF, guest.console
    assert f"page {hashlib.sha256(BODY).hexdigest()}  -" in guest.lines
    assert server.requests == ["/page"]
    assert "level 1" in guest.lines
    assert guest.refused == []
