"""Whether explore finds faults that are planted in kernels, and passes their sound twins.

    python benchmarks/explore_faults.py [NAME...]

Faults are planted in three ways, each in kernels of its own:

- kernels/faults/explore/planted.patch patches the source of some of kernels/ (tools/build-kernel,
  a minute or two each). All its faults are in one kernel; a number in its data says which is in
  force. The twin has another number there: nothing is in force, or the same done right.
- kernels/faults/explore/bytes.toml changes instructions in the vmlinux of Debian's 6.12 cloud
  kernel. The twin is that kernel.
- The guests of tests/guests.py are assembled with a flag for each hole. The twin is without.

A fault names the scenario and the event that should see it. It is found if a run goes wrong, with
the words that the fault says it must give (`Finds:`). Prints a row for each: the runs that went
wrong, of all; the worst in explore's words; the runs of the twin that went wrong. Ends with 1 if
less than 95 % are found, or a run of a twin goes wrong. NAME is a fault's or a kernel's.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import trapline
from trapline.explore.inject import ReferenceFailsError
from trapline.kernel.binary import Binary
from trapline.kernel.find.locate import locate
from trapline.results.explore import CLEAN, SEVERITY, Result

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "kernels" / "faults" / "explore"
BUILD = ROOT / "tools" / "build-kernel"
DEBIAN = "deb:linux-image-6.12-cloud-amd64|linux-image-cloud-amd64"
PATCH = FAULTS / "planted.patch"
ASKED = 0.95
REACH = 512  # bytes behind a symbol in which those to be changed are
SHOWN = 100

sys.path.insert(0, str(ROOT / "tests"))
import guests  # noqa: E402 - builders that tests share

IRQ = "irq:0x40"
# name: the guest's flags, the twin's, the scenario's text, the event.
ASSEMBLED = {
    "ve-on-users-stack": ("", "VE_ON_IST", guests.SYSCALL, "ve:wrmsr"),
    "gap-traps": ("GAP_TRAPS", "GAP_TRAPS VE_ON_IST", guests.SYSCALL, "nmi"),
    "nmi-without-swapgs": ("NO_PARANOIA", "", guests.SYSCALL, "nmi"),
    "irq-without-swapgs": ("IRQ_IN_C GS_OF_PLANTED", "IRQ_IN_C", guests.SYSCALL, IRQ),
    "nmi-calls-user": ("NMI_CALLS_USER", "", guests.SYSCALL, "nmi"),
    "nmi-lost": ("NMI_LOST", "", guests.SYSCALL, "nmi"),
    "torn-counter": ("TORN_COUNTER NMI_COUNTS", "NMI_COUNTS", guests.SYSCALL, "nmi"),
    "bystander": ("NMI_SCRIBBLES", "", guests.SYSCALL, "nmi"),
    "nmi-cr2": ("NMI_FAULTS", "", guests.SYSCALL, "nmi"),
    "nmi-no-iret": ("NO_IRET", "", guests.SYSCALL, "nmi"),
    "nmi-spins": ("NMI_SPINS", "", guests.SYSCALL, "nmi"),
    "nmi-panics": ("NMI_PANICS", "", guests.SYSCALL, "nmi"),
    "nmi-oopses": ("NMI_OOPSES", "", guests.SYSCALL, "nmi"),
    "nmi-user-memory": ("NMI_WRITES_USER", "", guests.SYSCALL, "nmi"),
    "nmi-page-table": ("NMI_WRITES_TABLE", "", guests.SYSCALL, "nmi"),
    "nmi-idt": ("NMI_WRITES_IDT", "", guests.SYSCALL, "nmi"),
    "nmi-idt-limit": ("NMI_CUTS_IDT", "", guests.SYSCALL, "nmi"),
    "nmi-fpu": ("NMI_USES_FPU", "", guests.SYSCALL, "nmi"),
    "nmi-dr0": ("NMI_WRITES_DR", "", guests.SYSCALL, "nmi"),
    "nmi-text": ("PROTECTED NMI_WRITES_TEXT", "PROTECTED", guests.SYSCALL, "nmi"),
    "ve-unread": ("VE_ON_IST VE_UNREAD", "VE_ON_IST", guests.SYSCALL, "ve:wrmsr"),
    "ve-early-sti": ("TRAP EARLY_STI IRQ_TRAPS", "TRAP IRQ_TRAPS", guests.TRAP, IRQ),
    "ve-always-sti": ("TRAP MASKED", "TRAP MASKED CONDITIONAL_STI", guests.TRAP, IRQ),
    "irq-no-eoi": ("TRAP IRQ_WITHOUT_EOI", "TRAP", guests.TRAP, IRQ),
}


class Fault(NamedTuple):
    """A planted fault: `tried` and `twin` do all its runs, and those of the sound twin."""

    name: str
    kernel: str
    finds: str
    tried: Callable[[], list[Result]]
    twin: Callable[[], list[Result]]


class Row(NamedTuple):
    """What came of one: runs that went wrong, runs, the worst, and what the twin did wrong."""

    bad: list[Result]
    runs: int
    alarms: int
    twins: int


def planted() -> Iterator[Fault]:
    """Yield the faults of the source patch."""
    numbers = dict(
        re.findall(r"^\+\t([A-Z0-9_]+) = (\d+),$", PATCH.read_text("utf-8"), re.MULTILINE)
    )
    entries = tomllib.loads((FAULTS / "planted.toml").read_text("utf-8"))
    assert {name.upper().replace("-", "_") for name in entries} == set(numbers)
    for name, entry in entries.items():
        number = int(numbers[name.upper().replace("-", "_")])
        twin = -number if entry.get("sound") else 0
        for kernel, runs in entry["runs"].items():
            yield Fault(
                name,
                kernel,
                entry.get("finds", ""),
                partial(of_number, kernel, runs, number),
                partial(of_number, kernel, runs, twin),
            )


@cache
def build(kernel: str) -> Path:
    """Build a kernel with the patch, and return its vmlinux."""
    command = [BUILD, kernel, "--patch", PATCH, "--as", f"explore-{kernel}"]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Path(run.stdout.strip()) / "vmlinux"


@cache
def of_number(kernel: str, runs: str, number: int) -> list[Result]:
    """Put a fault in force, and run."""
    return of_change(
        build(kernel), "planted_fault", bytes(4), number.to_bytes(4, "little", signed=True), runs
    )


@cache
def of_kernel(kernel: str, runs: str) -> list[Result]:
    """Run on a kernel as it is."""
    return explored(kernel, runs)


def explored(kernel: str, runs: str) -> list[Result]:
    """Run what a fault says: a scenario by the rules with one event, everywhere."""
    scenario, event = runs.split()
    return list(trapline.explore(kernel, scenarios=scenario, event=event, workers=1).results)


def changed() -> Iterator[Fault]:
    """Yield the faults that are changed instructions of Debian's kernel."""
    for name, entry in tomllib.loads((FAULTS / "bytes.toml").read_text("utf-8")).items():
        yield Fault(
            name,
            "Debian 6.12",
            entry.get("finds", ""),
            partial(of_bytes, entry),
            partial(of_kernel, DEBIAN, entry["runs"]),
        )


def of_bytes(entry: dict[str, str]) -> list[Result]:
    """Change instructions of Debian's kernel, and run."""
    vmlinux = locate(DEBIAN).vmlinux
    assert vmlinux is not None
    was, now = bytes.fromhex(entry["was"]), bytes.fromhex(entry["now"])
    return of_change(vmlinux, entry["symbol"], was, now, entry["runs"])


def of_change(vmlinux: Path, symbol: str, was: bytes, now: bytes, runs: str) -> list[Result]:
    """Copy a vmlinux, change the first bytes behind a symbol that are so, and run."""
    assert len(was) == len(now)
    with Binary.open_vmlinux(vmlinux) as binary:
        address = binary.address_of(symbol)
        assert address is not None, f"no symbol {symbol}"
        section = next(
            one
            for one in binary.elf.sections
            if one.address <= address < one.address + one.file_size
        )
    at = section.offset + address - section.address
    with TemporaryDirectory(prefix="trapline-faults-") as folder:
        copy = Path(folder) / "vmlinux"
        shutil.copyfile(vmlinux, copy)
        with copy.open("r+b") as file:
            file.seek(at)
            offset = file.read(REACH).find(was)
            assert offset >= 0, f"{was.hex(' ')} is not behind {symbol}"
            file.seek(at + offset)
            file.write(now)
        return explored(str(copy), runs)


def assembled() -> Iterator[Fault]:
    """Yield the faults of guests of a hundred instructions."""
    for name, (flags, twin, text, event) in ASSEMBLED.items():
        yield Fault(
            name,
            "assembled",
            "",
            partial(of_guest, flags, text, event),
            partial(of_guest, twin, text, event),
        )


def of_guest(flags: str, text: str, event: str) -> list[Result]:
    """Run in this process."""
    try:
        with guests.Opened(text, *flags.split()) as guest:
            return guest.all(event)
    except ReferenceFailsError as failure:
        return [failure.result]


def measure(fault: Fault) -> Row:
    """Do all runs of a fault and of its twin."""
    found, sound = fault.tried(), fault.twin()
    bad, alarms = (
        sorted(
            (one for one in results if one.verdict not in CLEAN),
            key=lambda one: -SEVERITY.index(one.verdict),
        )
        for results in (found, sound)
    )
    return Row(bad, len(found), len(alarms), len(sound))


def is_found(fault: Fault, row: Row) -> bool:
    """Whether a run went wrong, and one of them says what it must."""
    return any(fault.finds in " ".join((one.detail, *one.differs)) for one in row.bad)


def shown(row: Row, finds: str) -> str:
    """Say what came of a fault, by the finding that says what it must if there is one."""
    if not row.bad:
        return "nothing"
    one = next(
        (one for one in row.bad if finds in " ".join((one.detail, *one.differs))), row.bad[0]
    )
    said = next((each for each in (one.detail, *one.differs) if finds in each), one.detail)
    return f"{one.verdict}: {said}"


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    names = parser.parse_args().names
    faults = [
        one
        for one in (*assembled(), *changed(), *planted())
        if not names or one.name in names or one.kernel in names
    ]
    found = alarms = 0
    print("| fault | kernel | runs that go wrong | the worst | its twin | s |")
    print("|---|---|---|---|---|---|", flush=True)
    for fault in faults:
        start = time.monotonic()
        row = measure(fault)
        is_one = is_found(fault, row)
        found, alarms = found + is_one, alarms + row.alarms
        said = shown(row, fault.finds)
        print(
            f"| {fault.name} | {fault.kernel} | {len(row.bad):,} of {row.runs:,} "
            f"| {'' if is_one else '**missed** '}{said[:SHOWN]} | {row.alarms} of {row.twins:,} "
            f"| {time.monotonic() - start:.0f} |",
            flush=True,
        )
    share = found / len(faults)
    print(f"\n{found} of {len(faults)} found ({share:.1%}); {alarms} runs of sound twins go wrong")
    return 0 if share >= ASKED and not alarms else 1


if __name__ == "__main__":
    sys.exit(main())
