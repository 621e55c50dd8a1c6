"""The comparison of designs: its arithmetic, its text, and one real run."""

import hashlib
import shutil
import urllib.request

import msgspec
import pytest

from reports import text
from trapline.allowlist.listfile import load
from trapline.base.errors import ToolMissingError
from trapline.machine.qemu import process
from trapline.results.boot import BootKernel
from trapline.results.tradeoff import Design, TradeoffResult, WorkStep
from trapline.scan.stored import scan_once
from trapline.tradeoff.compare import DESIGNS, METHOD, compare, growth
from trapline.tradeoff.workload import CONSOLE_LINES, DISK_SIZE, Workload


def design(name, **changes):
    values = {
        "name": name,
        "steps": (WorkStep(name="disk read", passed=True),),
        "outcome": "powered-off",
        "ves": 22071,
        "mmio_ves": 1804,
        "direct": 0,
        "missed": 3,
        "tdvmcalls": 21974,
        "convert": 887,
        "convert_used": 15,
        "growth": 18493,
        "nmis": 0,
        "in_nmi": 0,
        "nested": 2,
        "screams": 1804,
        "scream_places": 41,
        "virtual_seconds": 1.8354,
        "wall_seconds": 23.04,
    }
    return Design(**values | changes)


def result(**changes):
    kernel = BootKernel(release="6.12.0", build_id=None, image="bzImage", file="vmlinuz", slide="0")
    return TradeoffResult(
        generator="trapline",
        kernel=kernel,
        module_version="1.5.01",
        devices=("1af4:1042 Virtio 1.0 block",),
        designs=tuple(design(name, **changes) for name in DESIGNS),
        missed_places=("iowrite8+0x1/0x2: string\x1b",),
        method=METHOD,
    )


@pytest.mark.parametrize(
    ("length", "entry", "bytes_added"), [(2, 14, 22), (5, 14, 19), (7, 14, 19), (2, 12, 20)]
)
def test_growth_is_padding_call_and_entry(length, entry, bytes_added):
    assert growth(length, entry) == bytes_added


def test_the_table_fits_a_mail_and_shows_what_applies():
    lines = text(result()).splitlines()
    assert max(map(len, lines)) <= 80
    lines = lines[: lines.index("How each number was got")]
    rows = {line[:26].strip(): line[26:].split() for line in lines if line[26:].strip()}
    assert rows["sites to convert"] == ["-", "887", "887"]
    assert rows["MMIO accesses missed"] == ["-", "3", "-"]
    assert rows["screams"] == ["-", "-", "1,804"]
    assert rows["workload correct"] == ["yes", "yes", "yes"]
    assert "\x1b" not in "\n".join(lines)


def test_a_failed_workload_is_named():
    failed = (WorkStep(name="disk read", passed=False),)
    assert "no: disk read" in text(result(steps=failed))


def test_each_number_has_its_method():
    report = text(result())
    for name in METHOD:
        assert name in report


def test_the_document_survives_a_round_trip():
    made = result()
    assert msgspec.json.decode(msgspec.json.encode(made), type=TradeoffResult) == made


def test_the_workload_checks_what_the_guest_says(tmp_path):
    with Workload(tmp_path) as work:
        seen_by_guest = work.init.split("-O - ")[1].split(" ")[0]
        page = urllib.request.urlopen(seen_by_guest.replace("10.0.2.2", "127.0.0.1")).read()
        disk = (tmp_path / "disk.img").read_bytes()
        assert len(disk) == DISK_SIZE
        said = (
            "init: began\ninit: loaded virtio_blk.ko\n"
            f"init: disk {hashlib.sha256(disk).hexdigest()}  /dev/vda\n"
            f"init: page {hashlib.sha256(page).hexdigest()}  -\n"
        ).encode()
        (tmp_path / "console.log").write_text(
            "".join(f"a line of console output {n}\r\n" for n in range(1, CONSOLE_LINES + 1))
        )
        assert all(step.passed for step in work.check(said))
        wrong = work.check(said.replace(b"disk ", b"disk 0"))
        assert [step.name for step in wrong if not step.passed] == ["disk read"]
        (tmp_path / "console.log").write_text("")
        assert not work.check(said)[-1].passed
        assert not any(step.passed for step in work.check(b""))


def test_a_missing_qemu_is_noticed_before_the_kernel_is_scanned(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ToolMissingError, match="apt-get install qemu-system-x86"):
        compare(None, lambda _: pytest.fail("scanned"))


@pytest.mark.kernel
@pytest.mark.skipif(
    shutil.which(process.EXECUTABLE) is None, reason="qemu-system-x86 is not installed"
)
def test_three_designs_on_a_debian_kernel(debian_kernel):
    made = compare(
        debian_kernel,
        lambda plan: scan_once(plan.files, plan.modules, load(), plan.image.build_id),
    )
    trap, paravirt, forbid = made.designs
    for each in made.designs:
        assert all(step.passed for step in each.steps), each
        assert each.outcome == "powered-off"
    assert trap.mmio_ves > 100
    assert trap.direct == trap.screams == trap.convert == 0
    # A conversion spares exactly the #VEs of the accesses that it catches.
    assert paravirt.direct > 100
    assert paravirt.mmio_ves == paravirt.missed
    assert paravirt.missed <= paravirt.direct // 100
    assert paravirt.ves < trap.ves
    assert 0 < paravirt.convert_used <= paravirt.convert
    assert paravirt.growth >= 19 * paravirt.convert  # alt_instr has 14 bytes in 6.12
    assert trap.nmis == trap.in_nmi == 0
    assert forbid.screams == forbid.mmio_ves > 100
    assert 0 < forbid.scream_places <= forbid.screams
