"""Whether explore finds faults that are planted in kernels, and passes their sound twins.

    python benchmarks/explore_faults.py [--kernel KERNEL]... [NAME...]

Faults are planted in three ways, each in kernels of its own:

- kernels/faults/explore/planted.patch patches the source of some of kernels/ (tools/build-kernel,
  a minute or two each). All its faults are in one kernel; a number in its data says which is in
  force. The twin has another number there: nothing is in force, or the same done right.
- kernels/faults/explore/bytes.toml changes instructions of Debian's 6.12 cloud kernel. The twin is
  that kernel as it is.
- The guests of tests/guests.py are assembled with a flag for each hole. The twin is without.

A fault names the scenario and the event that should see it. Number and bytes are written into the
memory of the guest where the window opens, so that one boot does for all faults of a kernel: it is
as sound as its twin until then. A fault is found if a run goes wrong, with the words that the fault
says it must give (`finds`); after 40 such runs no more are done. Prints a row for each: the runs
that went wrong, of those done; the worst in
explore's words; the runs of the twin that went wrong. Ends with 1 if less than 95 % are found, or a
run of a twin goes wrong. KERNEL is one of minimal, gcc, debian, assembled.
"""

import argparse
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from explore import configuration
from trapline.explore.course import Run
from trapline.explore.inject import Injector, ReferenceFailsError
from trapline.explore.scenario import load
from trapline.explore.triggers import Opening, Triggers
from trapline.explore.window import LiveWindow
from trapline.guest.target import Target
from trapline.kernel.live.runtime import KERNEL_MAP
from trapline.machine.machine import Machine
from trapline.results.explore import CLEAN, SEVERITY, Result

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "kernels" / "faults" / "explore"
BUILD = ROOT / "tools" / "build-kernel"
DEBIAN = "deb:linux-image-6.12-cloud-amd64|linux-image-cloud-amd64"
PATCH = FAULTS / "planted.patch"
ASKED = 0.95
REACH = 512  # bytes behind a symbol in which those to be changed are
SHOWN = 100
BUDGET = 400_000  # instructions until a run hangs; a sound one takes a tenth
ENOUGH = 40  # runs that went wrong; each takes time, and more say no more

sys.path.insert(0, str(ROOT / "tests"))
import guests  # noqa: E402 - builders that tests share


class Change(NamedTuple):
    """Bytes behind a symbol, and those that are written over them."""

    symbol: str
    was: bytes
    now: bytes


NOTHING = Change("", b"", b"")
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
    """A planted fault. `every`: it is tried at each so many boundaries."""

    name: str
    kernel: str
    scenario: str
    event: str
    finds: str
    every: int
    change: Change
    twin: Change


class Row(NamedTuple):
    """What came of one: the runs that went wrong, worst first, runs, and the same of the twin."""

    bad: list[Result]
    runs: int
    alarms: int
    twins: int
    seconds: float


def planted() -> Iterator[Fault]:
    """Yield the faults of the source patch."""
    text = PATCH.read_text("utf-8")
    numbers = dict(re.findall(r"^\+\t([A-Z0-9_]+) = (\d+),$", text, re.MULTILINE))
    entries = tomllib.loads((FAULTS / "planted.toml").read_text("utf-8"))
    assert {number_of(name) for name in entries} == set(numbers)
    for name, entry in entries.items():
        number = int(numbers[number_of(name)])
        twin = -number if entry.get("sound") else 0
        yield from faults(name, entry, numbered(number), numbered(twin))


def number_of(name: str) -> str:
    """Name the number of a fault."""
    return name.upper().replace("-", "_")


def numbered(number: int) -> Change:
    """Put a fault in force."""
    return Change("planted_fault", bytes(4), number.to_bytes(4, "little", signed=True))


def changed() -> Iterator[Fault]:
    """Yield the faults that are changed instructions."""
    for name, entry in tomllib.loads((FAULTS / "bytes.toml").read_text("utf-8")).items():
        was, now = bytes.fromhex(entry["was"]), bytes.fromhex(entry["now"])
        assert len(was) == len(now)
        symbol = entry["symbol"]
        yield from faults(name, entry, Change(symbol, was, now), Change(symbol, was, was))


def faults(name: str, entry: dict[str, Any], change: Change, twin: Change) -> Iterator[Fault]:
    """Yield a fault for each kernel that it is tried in."""
    for kernel, runs in entry["runs"].items():
        scenario, event = runs.split()
        finds, every = entry.get("finds", ""), entry.get("every", 1)
        yield Fault(name, kernel, scenario, event, finds, every, change, twin)


def kernel_of(name: str) -> str:
    """Return what a kernel is called as an argument; those of kernels/ are built with the patch."""
    if name == "debian":
        return DEBIAN
    command = [BUILD, name, "--patch", PATCH, "--as", f"explore-{name}"]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return run.stdout.strip()


def in_kernel(name: str, chosen: list[Fault]) -> Iterator[tuple[Fault, Row]]:
    """Boot a kernel for its faults, and try each where its window opens."""
    names = dict.fromkeys(one.scenario for one in chosen)
    source = configuration(kernel_of(name), *names).source
    scenarios = [load(each) for each in names]
    with Target(source) as target:
        for board in dict.fromkeys((one.append, one.mmio_uart) for one in scenarios):
            group = [one for one in scenarios if (one.append, one.mmio_uart) == board]
            machine = target.machine(board[0], mmio_uart=board[1])
            triggers = Triggers(machine, target, group)
            while (opening := triggers.next()) is not None:
                window = Planted(machine, target, opening)
                for fault in chosen:
                    if fault.scenario == opening.scenario.name:
                        yield fault, window.row(fault)
            assert not triggers.missing, triggers.missing
            machine.close()


class Planted:
    """The guest at the start of a window, where faults are planted."""

    def __init__(self, machine: Machine, target: Target, opening: Opening) -> None:
        self._machine, self._target, self._opening = machine, target, opening
        self._done: dict[tuple[Change, str, int], list[Result]] = {}

    def row(self, fault: Fault) -> Row:
        """Try a fault and its twin."""
        start = time.monotonic()
        return row(self._tried(fault, fault.change), self._tried(fault, fault.twin), start)

    def _tried(self, fault: Fault, change: Change) -> list[Result]:
        is_nothing = change.now == change.was
        key = NOTHING if is_nothing else change, fault.event, fault.every
        if key not in self._done:
            at = self._plant(change)
            self._done[key] = self._all(fault)
            self._write(at, change.was)
        return self._done[key]

    def _all(self, fault: Fault) -> list[Result]:
        window = LiveWindow(self._machine, self._target, self._opening)
        try:
            injector = Injector(window, f"trapline explore {fault.kernel}", budget=BUDGET)
        except ReferenceFailsError as failure:
            return [failure.result]
        else:
            results = []
            for boundary in range(window.first, len(window.steps), fault.every):
                results.append(injector.run(Run(fault.event, boundary)))
                if sum(one.verdict not in CLEAN for one in results) == ENOUGH:
                    break
            injector.close()
            return results
        finally:
            window.leave()

    def _plant(self, change: Change) -> int:
        """Change the first bytes behind a symbol that are as they must be; return their GPA."""
        address = self._target.address(change.symbol)
        assert address is not None, f"no symbol {change.symbol}"
        start = address - KERNEL_MAP + self._target.physical_base
        there = bytes(self._machine.memory.ram[start : start + REACH])
        offset = there.find(change.was)
        assert offset >= 0, f"{change.was.hex(' ')} is not behind {change.symbol}"
        self._write(start + offset, change.now)
        return start + offset

    def _write(self, gpa: int, data: bytes) -> None:
        self._machine.memory.ram[gpa : gpa + len(data)] = data
        self._machine.memory.code_changed(gpa, len(data))


def in_guests(chosen: "Chosen") -> Iterator[tuple[Fault, Row]]:
    """Try the faults of guests of a hundred instructions."""
    for name, (flags, twin, text, event) in ASSEMBLED.items():
        fault = Fault(name, "assembled", "", event, "", 1, NOTHING, NOTHING)
        if chosen.has(fault):
            start = time.monotonic()
            yield fault, row(of_guest(flags, text, event), of_guest(twin, text, event), start)


def of_guest(flags: str, text: str, event: str) -> list[Result]:
    """Do all runs of one."""
    try:
        with guests.Opened(text, *flags.split()) as guest:
            return guest.all(event)
    except ReferenceFailsError as failure:
        return [failure.result]


def row(found: list[Result], sound: list[Result], start: float) -> Row:
    """Sum up."""
    bad, alarms = (
        sorted(
            (one for one in results if one.verdict not in CLEAN),
            key=lambda one: -SEVERITY.index(one.verdict),
        )
        for results in (found, sound)
    )
    return Row(bad, len(found), len(alarms), len(sound), time.monotonic() - start)


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


class Chosen(NamedTuple):
    """What the command line names; nothing stands for all."""

    names: list[str]
    kernels: list[str]

    def has(self, fault: Fault) -> bool:
        """Whether a fault is to be tried."""
        return (not self.names or fault.name in self.names) and (
            not self.kernels or fault.kernel in self.kernels
        )


def rows(chosen: Chosen) -> Iterator[tuple[Fault, Row]]:
    """Try what the command line says."""
    yield from in_guests(chosen)
    wanted = [one for one in (*changed(), *planted()) if chosen.has(one)]
    for kernel in dict.fromkeys(one.kernel for one in wanted):
        yield from in_kernel(kernel, [one for one in wanted if one.kernel == kernel])


def main() -> int:
    """Print all of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--kernel", action="append", default=[])
    arguments = parser.parse_args()
    chosen = Chosen(arguments.names, arguments.kernel)
    count = found = alarms = 0
    print("| fault | kernel | tried with | runs that go wrong | the worst | its twin | s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for fault, row in rows(chosen):
        is_one = is_found(fault, row)
        count, found, alarms = count + 1, found + is_one, alarms + row.alarms
        said = f"{'' if is_one else '**missed** '}{shown(row, fault.finds)[:SHOWN]}"
        print(
            f"| {fault.name} | {fault.kernel} | {fault.scenario} {fault.event} "
            f"| {len(row.bad):,} of {row.runs:,} | {said} | {row.alarms} of {row.twins:,} "
            f"| {row.seconds:.0f} |",
            flush=True,
        )
    share = found / count if count else 0.0
    print(f"\n{found} of {count} found ({share:.1%}); {alarms} runs of sound twins go wrong")
    return 0 if share >= ASKED and not alarms else 1


if __name__ == "__main__":
    sys.exit(main())
