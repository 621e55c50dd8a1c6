"""Measure QEMU's devices in a TD: disk throughput, one MMIO access, what QEMU adds to the start.

    benchmarks/devices.py [KERNEL]

Prints one line a number, with the limit that it is held against; exits with 1 if one is missed.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from trapline.boot.plan import BootOptions, make_plan, parse_devices
from trapline.boot.run import BootRun
from trapline.cpu import memoryfile
from trapline.cpu.engine import Reg
from trapline.kernel.find.kernelfiles import KernelFiles
from trapline.kernel.find.locate import locate
from trapline.machine.devices.bus import Bus
from trapline.machine.devices.lapic import LocalApic
from trapline.machine.loader.initramfs import workload
from trapline.machine.qemu import catalogue
from trapline.machine.qemu.board import QemuBoard
from trapline.machine.vmm.ghci import TdVmCall
from trapline.tdx.vmm_interface import TrapListener, VeInfo

KERNEL = "deb:linux-image-6.12-cloud-amd64|linux-image-cloud-amd64"
MIB = 1 << 20
DISK = 128 * MIB
MEMORY = 64 * MIB
ROUNDS = 2000
STARTS = 9
LEAST_THROUGHPUT = 20  # MB/s
MOST_ROUND_TRIP = 120  # us
MOST_START = 0.2  # s
COMMANDS = """\
echo 1024 > /sys/block/vda/queue/read_ahead_kb
say "read begins"
busybox dd if=/dev/vda of=/dev/null bs=1M 2>/dev/null
say "read ends"
# One request, and one MMIO access, for each page.
echo 3 > /proc/sys/vm/drop_caches
echo 0 > /sys/block/vda/queue/read_ahead_kb
busybox dd if=/dev/vda of=/dev/null bs=4k count=2000 2>/dev/null
"""


class Stopwatch:
    """Looks at the console for the marks that the guest sets: wall and processor seconds."""

    def __init__(self) -> None:
        self.marks: dict[bytes, tuple[float, float]] = {}
        self.text = b""

    def __call__(self, data: bytes) -> None:
        """Take console output."""
        now = (time.perf_counter(), time.process_time())
        self.text += data
        for mark in (b"read begins", b"read ends"):
            if mark in self.text:
                self.marks.setdefault(mark, now)

    def seconds(self) -> list[float]:
        """Return how long the read took, by both clocks."""
        pairs = zip(self.marks[b"read begins"], self.marks[b"read ends"], strict=True)
        return [end - start for start, end in pairs]


def boot(files: KernelFiles, image: Path) -> tuple[list[float], list[float]]:
    """Boot a guest that reads the disk once; returns seconds of both clocks, and MMIO in us.

    An MMIO access is timed from its #VE, through the guest's handler, to QEMU's answer.
    """
    board, requests = parse_devices([f"blk,file={image}"])
    options = BootOptions(
        init=workload(COMMANDS),
        insmod=("virtio_blk",),
        command_line="console=ttyS0 quiet",
        board=board,
        devices=requests,
    )
    watch = Stopwatch()
    trips: list[float] = []
    with BootRun(make_plan(files, options), None, reproduce="", echo=watch) as run:
        services = run.machine.host.services
        serve = services.call

        trapped = 0.0

        class Traps(TrapListener):
            def on_ve(self, rip: int, info: VeInfo, *, double_fault: bool) -> None:
                del rip, info, double_fault
                nonlocal trapped
                trapped = time.perf_counter()

            def on_tdcall(self, rip: int, leaf: int, status: int) -> None:
                pass

            def on_tdvmcall(self, rip: int, registers: list[int]) -> None:
                pass

        def timed(registers: list[int]) -> None:
            leaf = registers[Reg.R11]
            serve(registers)
            if leaf == TdVmCall.REQUEST_MMIO:
                trips.append((time.perf_counter() - trapped) * 1e6)

        services.call = timed  # type: ignore[method-assign]
        with run.machine.module.listening(Traps()):
            run.run()
    return watch.seconds(), trips


def direct_round_trips() -> list[float]:
    """Read a device register through the buses, without a guest; microseconds each."""
    memory = memoryfile.create(MEMORY)
    apic = LocalApic(lambda: 0, 2_000_000_000, lambda: None)
    board = QemuBoard(
        [catalogue.parse("net")], memory, MEMORY, apic=apic, ioapic=None, frequency=2_000_000_000
    )
    trips = []
    with board:
        mmio = Bus("MMIO", 1 << 39)
        (function,) = board.functions
        address = next(bar.address for bar in function.bars if bar.index == 4)
        board.attach(Bus("port", 1 << 16), mmio)
        for _ in range(ROUNDS):
            start = time.perf_counter()
            mmio.read(address, 4)
            trips.append((time.perf_counter() - start) * 1e6)
    os.close(memory)
    return trips


def starts() -> list[float]:
    """Start and end QEMU; seconds each until its devices are configured."""
    taken = []
    for _ in range(STARTS):
        memory = memoryfile.create(MEMORY)
        apic = LocalApic(lambda: 0, 2_000_000_000, lambda: None)
        start = time.perf_counter()
        board = QemuBoard(
            [catalogue.parse("net")],
            memory,
            MEMORY,
            apic=apic,
            ioapic=None,
            frequency=2_000_000_000,
        )
        taken.append(time.perf_counter() - start)
        board.close()
        os.close(memory)
    return taken


def main() -> int:
    """Measure everything; returns the exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else KERNEL
    start = statistics.median(starts())
    direct = statistics.median(direct_round_trips())
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "disk.img"
        with image.open("wb") as file:
            for _ in range(DISK // MIB):
                file.write(os.urandom(MIB))
        (wall, processor), trips = boot(locate(name), image)
    host = statistics.median(trips)
    throughput = DISK / wall / 1e6
    rows = (
        ("QEMU start, median of 9", f"{start:.3f} s", f"<= {MOST_START} s", start <= MOST_START),
        ("register read through qtest, median", f"{direct:.0f} us", "", True),
        (
            f"MMIO from #VE to answer, median of {len(trips)}",
            f"{host:.0f} us",
            f"<= {MOST_ROUND_TRIP} us",
            host <= MOST_ROUND_TRIP,
        ),
        (
            "virtio-blk sequential read in the TD",
            f"{throughput:.1f} MB/s",
            f">= {LEAST_THROUGHPUT} MB/s",
            throughput >= LEAST_THROUGHPUT,
        ),
        ("  per second of processor time", f"{DISK / processor / 1e6:.1f} MB/s", "", True),
    )
    for what, value, limit, met in rows:
        print(f"{what:<52} {value:>12}  {limit:<12} {'' if met else 'MISSED'}".rstrip())
    return 0 if all(met for *_, met in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
