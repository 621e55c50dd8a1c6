"""Runs scan, boot, filter, tradeoff and verify on many kernels, and prints one table of what came.

    python benchmarks/kernels.py [--limit N] [--keep FOLDER] [KERNEL...]

KERNEL is as in benchmarks/explore_kernels.py, whose list is the default; Debian's 6.1, which is
no TDX guest, comes with it. Each command is run as a user runs it; the cells say with what it
ended and what its document says. What is not whole, not foreseen or not passed is listed below
the row, and at the end what verify finds on some kernels only. `--limit` is verify's. Ends with 1
where a kernel is not there, a trap was not foreseen, or a command ended with anything but 0 and
1, or 17 on a kernel that was built without CONFIG_INTEL_TDX_GUEST.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple

from explore_kernels import CLOUD, KERNELS, path_of
from trapline.base.errors import ExitCode, TraplineError
from trapline.kernel.find.locate import locate

COMMANDS: Final = ("scan", "boot", "filter check", "tradeoff", "verify")
#: Options that make a kernel of the list a case of its own.
FACTS: Final = {
    "CONFIG_MODULES": "modules", "CONFIG_PCI": "PCI", "CONFIG_VIRTIO_PCI": "virtio-pci",
    "CONFIG_DEBUG_INFO_BTF": "BTF", "CONFIG_KALLSYMS": "kallsyms", "CONFIG_RANDOMIZE_BASE": "KASLR",
    "CONFIG_KASAN": "KASAN", "CONFIG_PREEMPT_RT": "PREEMPT_RT", "CONFIG_LTO_CLANG": "LTO",
    "CONFIG_X86_FRED": "FRED", "CONFIG_X86_5LEVEL": "5-level paging",
    "CONFIG_UNWINDER_ORC": "ORC", "CONFIG_INTEL_TDX_GUEST": "TDX guest",
}  # fmt: skip

Document = dict[str, Any]


class Ran(NamedTuple):
    """One command on one kernel: its exit code, its document and its last words."""

    code: int
    document: Document
    words: str


def run(command: str, path: str, limit: int | None, folder: Path) -> Ran:
    """Run a command as a user does."""
    output = folder / f"{command.partition(' ')[0]}.json"
    words = [*command.split(), path, "--format", "json", "-o", str(output)]
    if command == "verify" and limit is not None:
        words += ["--limit", str(limit)]
    program = [sys.executable, "-c", "from trapline.cli.start import main; main()"]
    ran = subprocess.run(
        [*program, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        check=False,
    )  # fmt: skip
    document = json.loads(output.read_bytes()) if output.exists() else {}
    return Ran(ran.returncode, document, ran.stderr.strip().rpartition("\n")[2])


def scan_cell(document: Document) -> str:
    """Count what a scan lists, and what it could not see."""
    unseen = len(document["coverage"]["missing"])
    whole = "whole" if document["coverage"]["complete"] else f"not whole: {unseen}"
    return f"{len(document['sites']):,} sites, {whole}"


def boot_cell(document: Document) -> str:
    """Say how a boot ended, and what share of its traps the scan had foreseen."""
    sound = document["soundness"]
    share = f"{sound['traps_found']:,}/{sound['traps']:,}"
    return (
        f"{document['outcome']['kind']}, {share} traps, "
        f"{sound['sites_found']}/{sound['sites']} places"
    )


def filter_cell(document: Document) -> str:
    """Count drivers, and those that bind though the list does not let them in."""
    return f"{len(document['drivers'])} drivers, {len(document['findings'])} bind all the same"


def tradeoff_cell(document: Document) -> str:
    """Count the parts of the workload that passed."""
    steps = [step for design in document["designs"] for step in design["steps"]]
    return f"{sum(step['passed'] for step in steps)}/{len(steps)} parts passed"


def verify_cell(document: Document) -> str:
    """Count cases and causes."""
    return f"{len(document['findings'])} causes in {document['cases']:,} cases"


CELLS: Final = dict(
    zip(COMMANDS, (scan_cell, boot_cell, filter_cell, tradeoff_cell, verify_cell), strict=True)
)


def facts(path: str) -> tuple[str, bool]:
    """Say what a kernel was built with and without; and whether it can be a TD."""
    config = locate(path).config
    having = [name for option, name in FACTS.items() if config.get(option, "n") != "n"]
    lacking = [name for option, name in FACTS.items() if config.get(option, "n") == "n"]
    text = f"with {', '.join(having)}; without {', '.join(lacking)}"
    return text, config.get("CONFIG_INTEL_TDX_GUEST") == "y"


def notes(command: str, ran: Ran) -> list[str]:
    """List what a reader will ask for."""
    document = ran.document
    if not document:
        return [f"{command}: {ran.words}"]
    if command == "scan":
        return list(document["coverage"]["missing"])
    if command == "boot":
        return [f"not foreseen: {each}" for each in document["unaccounted"]]
    if command == "tradeoff":
        failed = {
            step["name"]
            for design in document["designs"]
            for step in design["steps"]
            if not step["passed"]
        }
        return [f"tradeoff: failed: {', '.join(sorted(failed))}"] if failed else []
    return []


def is_sound(ran: Ran) -> bool:
    """Whether the scan had foreseen all that a boot did."""
    sound = ran.document.get("soundness")
    return sound is None or (
        sound["traps_found"] == sound["traps"] and sound["sites_found"] == sound["sites"]
    )


def row(kernel: str, limit: int | None, folder: Path) -> tuple[bool, dict[str, Ran]]:
    """Run all on one kernel and print its row; returns whether all was as it should be."""
    try:
        path = path_of(kernel)
        text, can_be_td = facts(path)
    except TraplineError as error:
        print(f"| {kernel} | not there: {error} |" + " |" * (len(COMMANDS) - 1), flush=True)
        return False, {}
    folder.mkdir(parents=True, exist_ok=True)
    ran = {command: run(command, path, limit, folder) for command in COMMANDS}
    cells = [
        f"{each.code}: {CELLS[command](each.document) if each.document else 'refused'}"
        for command, each in ran.items()
    ]
    print(f"| {kernel} | {' | '.join(cells)} |", flush=True)
    print(f"<!-- {kernel} {text} -->")
    for command, each in ran.items():
        for note in notes(command, each):
            print(f"<!-- {kernel} {note} -->", flush=True)
    allowed = {ExitCode.CLEAN, ExitCode.FINDINGS}
    if not can_be_td:
        allowed |= {ExitCode.NOT_A_TDX_KERNEL}
    good = all(each.code in allowed for each in ran.values()) and is_sound(ran["boot"])
    return good, ran


def compared(found: dict[str, Document]) -> None:
    """Print what verify finds on some kernels and not on all."""
    causes: dict[str, set[str]] = {}
    for kernel, document in found.items():
        for finding in document["findings"]:
            text = f"{finding['class']} {finding['kind']}: {finding['cause']}"
            causes.setdefault(text, set()).add(kernel)
    for text, kernels in sorted(causes.items()):
        if len(kernels) < len(found):
            print(f"<!-- verify: {text}: on {', '.join(sorted(kernels))} only -->")


def main() -> int:
    """Run all on what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", type=int, help="cases of verify beside one for each form")
    parser.add_argument("--keep", type=Path, help="folder for the documents")
    default = (f"fetched:bookworm-security/{CLOUD}", *KERNELS)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", default=default)
    arguments = parser.parse_args()
    print(f"| kernel | {' | '.join(COMMANDS)} |")
    print("|---" * (1 + len(COMMANDS)) + "|", flush=True)
    good = 0
    found: dict[str, Document] = {}
    with tempfile.TemporaryDirectory(prefix="trapline-") as temporary:
        for kernel in arguments.kernels:
            folder = (arguments.keep or Path(temporary)) / kernel.translate(
                str.maketrans("/|", "__")
            )
            is_good, ran = row(kernel, arguments.limit, folder)
            good += is_good
            if ran and ran["verify"].document:
                found[kernel] = ran["verify"].document
    compared(found)
    print(f"\n{good} of {len(arguments.kernels)} kernels as they should be")
    return 0 if good == len(arguments.kernels) else 1


if __name__ == "__main__":
    sys.exit(main())
