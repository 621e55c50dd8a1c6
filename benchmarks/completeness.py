"""Checks that `trapline scan` finds every MMIO instruction that DWARF knows of.

    python benchmarks/completeness.py [KERNEL]

Scans KERNEL (default: the newest Debian 6.12 cloud kernel), then finds the MMIO instructions of
vmlinux and of each module a second way: by a walk of all of .debug_info that shares nothing with
the product but the decoder (tests/diewalk.py). Prints each difference and the sums; exits with 1
where there is any difference.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import diewalk
from trapline.devicefilter.listfile import load
from trapline.kernel.files import KernelFiles
from trapline.kernel.locate import locate
from trapline.scan.engine import scan

DEFAULT = "deb:linux-image-6.12-cloud-amd64|linux-image-cloud-amd64"


def objects(kernel: KernelFiles) -> Iterator[tuple[str, Path, Path]]:
    """Yield (name, code, debug file) of vmlinux and each module that has DWARF."""
    yield "vmlinux", kernel.vmlinux, kernel.vmlinux
    for module in kernel.modules:
        if module.debug is not None:
            # Debian's debug files hold the code too; the module itself is compressed.
            yield module.name, module.debug, module.debug


def main(arguments: list[str]) -> int:
    """Compare both ways, object by object."""
    kernel = locate(arguments[0] if arguments else DEFAULT, announce=print)
    if kernel.vmlinux is None:
        print("no vmlinux: without DWARF there is nothing to compare")
        return 2
    started = time.perf_counter()
    result = scan(kernel, load())
    scanned_in = time.perf_counter() - started
    by_module = {}
    for site in result.sites:
        by_module.setdefault(site.module, []).append(site)
    started = time.perf_counter()
    sums = dict.fromkeys(("objects", "walked", "scanned", "missing", "extra"), 0)
    for name, code, debug in objects(kernel):
        walked = diewalk.find(code, debug)
        places = diewalk.scanned_places(by_module.get(name, ()), name)
        missing, extra = diewalk.compare(walked, places)
        for item in missing:
            print(f"{name}: missing {item.section}+{item.address:#x} ({item.accessor})")
        for section, address in extra:
            print(f"{name}: extra {section}+{address:#x}")
        if name == "vmlinux":
            print(f"vmlinux: {len(places)} MMIO instructions by the scan, {len(walked)} by walk")
        sums["objects"] += 1
        sums["walked"] += len(walked)
        sums["scanned"] += len(places)
        sums["missing"] += len(missing)
        sums["extra"] += len(extra)
    print(f"{kernel.release}: " + ", ".join(f"{count:,} {what}" for what, count in sums.items()))
    print(f"scan {scanned_in:.1f} s, walk {time.perf_counter() - started:.1f} s")
    return 1 if sums["missing"] or sums["extra"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
