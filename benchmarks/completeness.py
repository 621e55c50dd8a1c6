"""Checks that `trapline scan` finds every MMIO instruction that DWARF knows of.

    python benchmarks/completeness.py [KERNEL]

Scans KERNEL (default: the newest Debian 6.12 cloud kernel), then finds the MMIO instructions of
vmlinux and of each module a second way: by a walk of all of .debug_info that shares nothing with
the product but the decoder (tests/diewalk.py). Both know accessors by their names. So a third way
looks for what might be an accessor of another name, by types and instructions
(tests/suspectwalk.py): each must hold an access that the scan found, or be reviewed. Last, objects
that map device memory and hold no access at all are counted: those that dereference it.

Prints each difference and the sums; exits with 1 where there is any difference.
"""

import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import diewalk
import suspectwalk
from trapline.allowlist.listfile import load
from trapline.kernel.find.kernelfiles import KernelFiles
from trapline.kernel.find.locate import locate
from trapline.results.scan import Mapping, ScanResult, Site
from trapline.scan.wholekernel import scan

DEFAULT = "deb:linux-image-6.12-cloud-amd64|linux-image-cloud-amd64"


def objects(kernel: KernelFiles) -> Iterator[tuple[str, Path, Path]]:
    """Yield (name, code, debug file) of vmlinux and each module that has DWARF."""
    yield "vmlinux", kernel.vmlinux, kernel.vmlinux
    for module in kernel.modules:
        if module.debug is not None:
            # Debian's debug files hold the code too; the module itself is compressed.
            yield module.name, module.debug, module.debug


def silent_mappings(result: ScanResult) -> tuple[list[str], int]:
    """Return the objects and modules that map memory and access none; and how many map memory."""

    def unit(item: Site | Mapping) -> str:
        return (item.module == "vmlinux" and item.object) or item.module

    mapping = {unit(item) for item in result.mappings}
    accessing = {unit(site) for site in result.sites if site.trap == "mmio"}
    return sorted(mapping - accessing), len(mapping)


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
    columns = ("objects", "walked", "scanned", "missing", "extra")
    sums = dict.fromkeys((*columns, "suspects", "reviewed", "unexplained"), 0)
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
        suspects = suspectwalk.find(code, debug)
        unexplained = suspectwalk.unexplained(suspects, by_module.get(name, ()), name)
        for suspect in unexplained:
            place = f"{suspect.section}+{suspect.spans[0][0]:#x}"
            print(f"{name}: unexplained {suspect.function} ({suspect.file}) at {place}")
        sums["suspects"] += len(suspects)
        sums["reviewed"] += sum(suspectwalk.reason(suspect) is not None for suspect in suspects)
        sums["unexplained"] += len(unexplained)
        sums["objects"] += 1
        sums["walked"] += len(walked)
        sums["scanned"] += len(places)
        sums["missing"] += len(missing)
        sums["extra"] += len(extra)
    print(f"{kernel.release}: " + ", ".join(f"{count:,} {what}" for what, count in sums.items()))
    silent, mapping = silent_mappings(result)
    print(f"{mapping} objects and modules map memory; no access found in {len(silent)}:")
    print(textwrap.fill(", ".join(silent), 100, initial_indent="  ", subsequent_indent="  "))
    print(f"scan {scanned_in:.1f} s, walk {time.perf_counter() - started:.1f} s")
    return 1 if sums["missing"] or sums["extra"] or sums["unexplained"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
