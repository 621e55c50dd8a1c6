"""Debian's stock drivers on QEMU's devices, in the TD."""

import hashlib
import http.server
import random
import shutil
import socket
import subprocess
import threading

import pytest

from devices_guest import Guest
from trapline.allowlist import listfile
from trapline.boot.policy import Guard
from trapline.machine.outcome import OutcomeKind
from trapline.machine.qemu import process
from trapline.machine.qemu.board import QemuBoard

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        shutil.which(process.EXECUTABLE) is None, reason="qemu-system-x86 is not installed"
    ),
]

BODY = b"served over loopback\n" * 4000
NETWORK = """
busybox ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
say "page $(busybox wget -q -O - http://10.0.2.2:{port}/page | busybox sha256sum)"
"""


class Server:
    """A loopback HTTP server; `requests` are the paths that were asked for."""

    def __init__(self):
        requests = self.requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                self.send_response(200)
                self.send_header("Content-Length", str(len(BODY)))
                self.end_headers()
                self.wfile.write(BODY)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.http.server_address[1]
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


class Terminal:
    """The other end of a virtio console: logs in when asked, and says goodbye."""

    def __init__(self, path):
        self.heard = bytearray()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.thread = threading.Thread(target=self.talk, daemon=True)

    def talk(self):
        line, _ = self.listener.accept()
        with line:
            script = [(b"login: ", b"root\n"), (b"# ", b"echo tty is $(tty)\n"), (b"# ", b"exit\n")]
            seen = 0
            while chunk := line.recv(4096):
                self.heard += chunk
                if script and script[0][0] in self.heard[seen:]:
                    seen = len(self.heard)
                    line.sendall(script.pop(0)[1])

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.listener.close()
        self.thread.join(10)


def make_ext4(folder, image):
    """Fill a file system with files whose sums are returned."""
    tree = folder / "tree"
    tree.mkdir()
    source = random.Random(5)
    sums = {}
    for number, size in enumerate((0, 1, 4096, 100_001, 1_500_000)):
        data = source.randbytes(size)
        (tree / f"file{number}").write_bytes(data)
        sums[f"file{number}"] = hashlib.sha256(data).hexdigest()
    subprocess.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(tree), str(image), "8M"],
        check=True,
        capture_output=True,
    )
    return sums


COMMANDS = """
say "whole $(busybox sha256sum /dev/vda)"
busybox mkdir /mnt
busybox mount -o ro -t ext4 /dev/vda /mnt && say "mounted"
for file in /mnt/file*; do say "sum $(busybox sha256sum $file)"; done
say "read-only $(busybox cat /sys/block/vda/ro)"
busybox mkdir -p /etc
echo 'root::0:0::/:/bin/sh' > /etc/passwd
echo 'root:x:0:' > /etc/group
busybox ln -s busybox /bin/sh
busybox ln -s busybox /bin/login
busybox ln -s busybox /bin/tty
busybox getty -L 0 hvc0 vt100
say "logged out"
"""


@pytest.mark.skipif(shutil.which("mke2fs") is None, reason="mke2fs is not installed")
def test_block_network_and_console(debian_kernel, tmp_path):
    image = tmp_path / "disk.img"
    sums = make_ext4(tmp_path, image)
    whole = hashlib.sha256(image.read_bytes()).hexdigest()
    line = tmp_path / "line"
    with Server() as server, Terminal(line) as terminal:
        guest = Guest(
            debian_kernel,
            COMMANDS + NETWORK.format(port=server.port),
            [f"blk,file={image}", "net", f"console,socket={line}"],
            ("virtio_blk", "virtio_net"),
        )
    assert guest.outcome.kind == OutcomeKind.POWERED_OFF, guest.console
    assert "mounted" in guest.lines
    found = dict(
        reversed(line.removeprefix("sum ").replace("/mnt/", "").split())
        for line in guest.lines
        if line.startswith("sum ")
    )
    assert found == sums
    assert f"whole {whole}  /dev/vda" in guest.lines
    assert "read-only 1" in guest.lines
    assert f"page {hashlib.sha256(BODY).hexdigest()}  -" in guest.lines
    assert server.requests == ["/page"]
    assert b"login: " in terminal.heard
    assert b"tty is /dev/hvc0" in terminal.heard
    assert "logged out" in guest.lines
    assert guest.refused == []
    assert hashlib.sha256(image.read_bytes()).hexdigest() == whole


def test_legacy_devices_are_refused_by_the_drivers_of_a_td(debian_kernel, tmp_path):
    """Half of the e-mail's ids: virtio without VERSION_1 cannot promise to keep to the DMA API."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    guest = Guest(
        debian_kernel,
        'for why in $(busybox dmesg | busybox grep -o "VIRTIO_F_VERSION_1"); do say "$why"; done\n',
        [f"blk-legacy,file={image}", "net-legacy", "console-legacy"],
        ("virtio_blk", "virtio_net"),
        symbols=True,
    )
    assert guest.lines.count("VIRTIO_F_VERSION_1") == 3
    # The transport is bound all the same, and has touched the host.
    assert [device.drivers for device in guest.result.devices] == [("virtio-pci",)] * 3
    assert [device.id for device in guest.result.devices] == ["1af4:1001", "1af4:1000", "1af4:1003"]
    assert not guest.result.repeatable


def test_the_allow_list_hides_or_reports(debian_kernel, debian_scan, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(b"sector" * 1000)
    allow = listfile.parse(
        b'schema = "trapline/allow-list"\nversion = 1\ntitle = "disks"\n'
        b'[[allow]]\nid = "1af4:1042"\nname = "a disk"\n',
        "test",
    )
    commands = (
        'say "slots $(busybox ls /sys/bus/pci/devices | busybox tr "\\n" " ")"\n'
        'say "disk $(busybox head -c 6 /dev/vda)"\n'
    )
    seen = {}
    for hide in (True, False):
        seen[hide] = Guest(
            debian_kernel,
            commands,
            [f"blk,file={image}", "net"],
            ("virtio_blk",),
            symbols=True,
            scan=debian_scan,
            guard=Guard(allow=allow, hide=hide),
        )
    hidden, reported = seen[True], seen[False]
    assert "disk sector" in hidden.lines
    assert "slots 0000:00:00.0 0000:00:01.0 0000:00:02.0" in hidden.lines
    assert hidden.result.screams == ()
    assert [(d.allowed, d.hidden) for d in hidden.result.devices] == [(True, False), (False, True)]
    assert "disk sector" in reported.lines
    assert "slots 0000:00:00.0 0000:00:01.0 0000:00:02.0 0000:00:03.0" in reported.lines
    assert [(d.allowed, d.hidden) for d in reported.result.devices] == [
        (True, False),
        (False, False),
    ]
    assert reported.result.screams
    assert {scream.reason for scream in reported.result.screams} == {"not-allowed"}
    assert {scream.device for scream in reported.result.screams} == {"0000:00:03.0"}
    first = reported.result.screams[0]
    assert first.driver == "virtio-pci"
    assert first.scan_id
    labels = [place.label.partition("+")[0] for place in first.splat.trace]
    assert "virtio_pci_probe" in labels


def test_a_forbidden_access_can_end_the_run(debian_kernel, debian_scan, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    guest = Guest(
        debian_kernel,
        "",
        [f"blk,file={image}"],
        ("virtio_blk",),
        symbols=True,
        scan=debian_scan,
        guard=Guard(classes={"mmio": "forbid"}, panic=True),
    )
    assert guest.outcome.kind == OutcomeKind.FORBIDDEN
    assert guest.outcome.kind.exit_code == 27
    assert sum(scream.count for scream in guest.result.screams) == 1
    assert "is forbidden (device 0000:00:02.0 1af4:1042" in guest.result.screams[0].splat.banner


def test_nearly_all_traps_of_virtio_devices_were_foreseen(debian_kernel, debian_scan, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    guest = Guest(
        debian_kernel,
        'say "$(busybox sha256sum /dev/vda)"\necho hello > /dev/hvc0\n'
        "busybox ifconfig eth0 10.0.2.15 up\n",
        [
            f"blk,file={image}",
            "net",
            "console",
            f"9p,share={tmp_path}",
            f"blk-legacy,file={image}",
            "net-legacy",
            "console-legacy",
            f"9p-legacy,share={tmp_path}",
        ],
        ("virtio_blk", "virtio_net"),
        symbols=True,
        scan=debian_scan,
    )
    assert guest.outcome.kind == OutcomeKind.POWERED_OFF, guest.console
    sound = guest.result.soundness
    assert sound.scanned
    assert sound.traps > 10_000
    assert sound.traps_found >= 0.99 * sound.traps
    assert all(site.reason for site in guest.result.unaccounted)


def test_a_qemu_that_dies_ends_the_run_and_is_named(debian_kernel, tmp_path, monkeypatch):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    attach = QemuBoard.attach

    def attach_and_kill(board, *arguments):
        attach(board, *arguments)
        board._process._process.kill()
        board._process._process.wait()

    monkeypatch.setattr(QemuBoard, "attach", attach_and_kill)
    guest = Guest(debian_kernel, "", [f"blk,file={image}"], ("virtio_blk",))
    assert guest.outcome.kind == OutcomeKind.DEVICES_DIED
    assert "died during the run" in guest.outcome.detail
    assert guest.outcome.kind.exit_code == 19
