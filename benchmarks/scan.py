"""How long a scan takes, how much memory it needs, and how that compares.

    python benchmarks/scan.py [KERNEL] [--workers N] [--cold]

Scans KERNEL (default: Debian's 6.12 cloud kernel, fetched once) twice in one run, each time in a
fresh process: with N workers and, as the baseline, with one. A scan before them warms the page
cache and is not counted, unless --cold is given. drgn, where installed, gives the frames of the
same vmlinux addresses: it cannot list sites, but tells what reading DWARF costs at least.
"""

import argparse
import multiprocessing
import os
import resource
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

from trapline.allowlist.listfile import load
from trapline.kernel.binary import Binary
from trapline.kernel.find.kernelfiles import KernelFiles
from trapline.kernel.find.locate import locate
from trapline.scan.wholekernel import scan

KERNEL = "deb:linux-image-6.12-cloud-amd64|linux-image-cloud-amd64"
_INTERVAL = 0.02  # seconds between two looks at the memory
_MIB = 1 << 20


class Measurement(NamedTuple):
    """One scan: wall and processor time in seconds, peak memory in bytes, what it found."""

    seconds: float
    processor: float  # of all processes; a busy machine lengthens the wall time only
    peak: int
    sites: int
    mappings: int
    addresses: list[int]  # of the sites in vmlinux


class PeakMemory:
    """Highest sum of the resident sets of this process and its children, in bytes.

    Pages that processes share count once for each: an upper bound of what is needed.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        me = os.getpid()
        # Children belong to the thread that started them.
        children = Path(f"/proc/{me}/task/{me}/children")
        while not self._stop.wait(_INTERVAL):
            total = 0
            for process in (str(me), *children.read_text().split()):
                try:
                    total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * page
                except (FileNotFoundError, ProcessLookupError):
                    continue  # it has just ended
            self.peak = max(self.peak, total)


def processor_seconds() -> float:
    """Time that this process and its ended children have used."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def measure(kernel: KernelFiles, workers: int) -> Measurement:
    """Scan once."""
    start, processor = time.perf_counter(), processor_seconds()
    with PeakMemory() as memory:
        result = scan(kernel, load(), workers=workers)
    return Measurement(
        time.perf_counter() - start,
        processor_seconds() - processor,
        memory.peak,
        len(result.sites),
        len(result.mappings),
        [int(site.address, 16) for site in result.sites if site.module == "vmlinux"],
    )


def measure_apart(kernel: KernelFiles, workers: int) -> Measurement:
    """Scan once, in a process that has nothing else in memory."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as executor:
        return executor.submit(measure, kernel, workers).result()


def drgn_seconds(vmlinux: Path, addresses: list[int]) -> float | None:
    """How long drgn takes to load a vmlinux and to name frames, or None without drgn."""
    try:
        import drgn  # noqa: PLC0415 - optional
    except ImportError:
        return None
    start = time.perf_counter()
    program = drgn.Program(drgn.Platform(drgn.Architecture.X86_64))
    module = program.extra_module("vmlinux", create=True)
    with Binary.open_vmlinux(vmlinux) as binary:
        module.address_range = (binary.text[0].address, binary.text[-1].end)
    module.try_file(vmlinux, force=True)
    for address in addresses:
        for frame in program.stack_trace_from_pcs([address + 1]):
            assert frame.name
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", nargs="?", default=KERNEL, help="as for `trapline scan`")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cold", action="store_true", help="count the first scan")
    options = parser.parse_args()

    kernel = locate(options.kernel, announce=print)
    if not options.cold:
        measure_apart(kernel, options.workers)
    spread = measure_apart(kernel, options.workers)
    alone = measure_apart(kernel, 1)
    print(f"kernel      {kernel.release}, vmlinux and {len(kernel.modules):,} modules")
    print(f"found       {spread.sites:,} sites, {spread.mappings:,} mappings")
    for name, workers, one in (("scan", options.workers, spread), ("baseline", 1, alone)):
        print(
            f"{name:11} {one.seconds:.1f} s wall, {one.processor:.1f} s CPU with {workers} "
            f"worker{'s' * (workers != 1)}, {one.peak / _MIB:,.0f} MiB peak over all processes, "
            f"{one.sites / one.seconds:,.0f} sites/s"
        )
    print(f"ratio       {alone.seconds / spread.seconds:.2f} times as fast as the baseline")
    if kernel.vmlinux is not None:
        seconds = drgn_seconds(kernel.vmlinux, spread.addresses)
        if seconds is not None:
            print(
                f"drgn        {seconds:.1f} s for the frames of the {len(spread.addresses):,} "
                f"addresses found in vmlinux; the scan with all modules takes "
                f"{spread.seconds / seconds:.1f} times that"
            )


if __name__ == "__main__":
    main()
