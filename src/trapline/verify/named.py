"""MSRs that a kernel names itself: the constants in front of its sites.

They are only what is tried, so they need not be right: of the bytes in front of a site, the last
that read like a load of the register in which the number goes, if an MSR can have that number.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from trapline.kernel.binary import Binary
from trapline.results.scan import ScanResult, Site

_BEFORE: Final = 64  # bytes
# MOV r32, imm32: to ECX in front of an instruction, to EDI or ESI in front of a call.
_TO_ECX: Final = (0xB9,)
_TO_ARGUMENT: Final = (0xBF, 0xBE)
# What has a bitmap, AMD's, and what hypervisors have taken: Hyper-V's and KVM's.
_MSRS: Final = (
    range(1, 0x2000), range(0xC000_0000, 0xC000_2000), range(0xC001_0000, 0xC001_2000),
    range(0x4000_0000, 0x4000_0200), range(0x4B56_4D00, 0x4B56_4E00),
)  # fmt: skip


def msrs_of(scan: ScanResult, vmlinux: Path) -> tuple[int, ...]:
    """Return the numbers, in order. Raises BadImageError for what is no vmlinux."""
    with Binary.open_vmlinux(vmlinux) as binary:
        return tuple(sorted(set(_numbers(scan, binary))))


def _numbers(scan: ScanResult, binary: Binary) -> Iterator[int]:
    for site in scan.sites:
        if site.trap != "msr" or site.module != "vmlinux":
            continue
        code = binary.read(int(site.address, 16) - _BEFORE, _BEFORE)
        number = None if code is None else _number(code, site)
        if number is not None:
            yield number


def _number(code: bytes, site: Site) -> int | None:
    loads = _TO_ECX if site.form == "instruction" else _TO_ARGUMENT
    at = max(code.rfind(load, 0, len(code) - 4) for load in loads)
    number = int.from_bytes(code[at + 1 : at + 5], "little")
    return number if at >= 0 and any(number in msrs for msrs in _MSRS) else None
