"""How fast `trapline verify` tries cases: `python benchmarks/verify.py [KERNEL [WORKERS]]`.

Prints the seconds for all cases with one worker's share of CPU time, cases a second, and the
peak memory of a worker. The target is 20,000 cases in 120 seconds on two cores.
"""

import resource
import sys
import time

from trapline.guest.target import TargetSource
from trapline.kernel.find.locate import locate
from trapline.verify.launch import initrd
from trapline.verify.rounds import Options, run

DEFAULT = "deb:linux-image-6.12-cloud-amd64|linux-image-cloud-amd64"
TARGET_CASES = 20_000
TARGET_SECONDS = 120


def main(kernel: str, workers: int) -> int:
    """Run all cases once."""
    files = locate(kernel)
    assert files.vmlinux is not None
    source = TargetSource(kernel=kernel, vmlinux=files.vmlinux.resolve(), initrd=initrd())
    start = time.monotonic()
    tried = run(source, Options(workers=workers))
    seconds = time.monotonic() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    print(f"cases             {len(tried):,}")
    print(f"wall clock        {seconds:.1f} s with {workers} workers, booting included")
    print(f"CPU time          {cpu:.1f} s, {1e3 * cpu / len(tried):.2f} ms a case")
    print(f"cases a second    {len(tried) / seconds:,.0f}")
    print(f"memory, worker    {used.ru_maxrss / 1024:,.0f} MiB at its peak")
    reached = len(tried) >= TARGET_CASES and seconds <= TARGET_SECONDS
    print(f"target            {TARGET_CASES:,} cases in {TARGET_SECONDS} s: {reached}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(
        main(
            sys.argv[1] if len(sys.argv) > 1 else DEFAULT,
            int(sys.argv[2]) if len(sys.argv) > 2 else 2,
        )
    )
