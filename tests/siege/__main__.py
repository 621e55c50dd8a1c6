"""Runs a campaign against trapline and prints a table; exit code 1 for a fault.

With no option, all of it: inputs of each kind, guests, kills.
"""

import argparse
import os
import sys
from pathlib import Path

import tiny_kernel
from siege import kills, kinds
from siege.batches import Kind, Tally, attempt, run_all
from siege.guests import guests

HEAD = f"{'kind':24}{'inputs':>9}{'read':>9}{'refused':>9}{'crashes':>9}{'hangs':>7}"
HEAD += f"{'MiB':>6}{'slowest s':>11}"
SHOWN = 20  # faults of a kind


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="siege", description=__doc__)
    parser.add_argument(
        "--inputs", type=int, default=55_000, help="of each kind, fewer of the dear ones"
    )
    parser.add_argument("--guests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=500, help="of all commands together")
    parser.add_argument("--kernel", help="to kill boot, explore and verify of, too")
    parser.add_argument("--kind", action="append", help="only these, no guests and no kills")
    parser.add_argument("--replay", metavar="KIND:NUMBER", help="or KIND:FILE; here")
    parser.add_argument("--keep", type=Path, help="a folder for inputs that a fault came of")
    options = parser.parse_args()
    folder = kinds.make_folder()
    try:
        inputs = kinds.all_kinds(folder)
        if options.replay:
            return replay([*inputs, guests()], options.replay)
        if options.kind:
            chosen = [kind for kind in [*inputs, guests()] if kind.name in options.kind]
            return 1 if throw(chosen, options.inputs, options.keep) else 0
        faults = throw(inputs, options.inputs, options.keep)
        faults += throw([guests()], options.guests, options.keep)
        faults += strike(options.kills, options.kernel, folder)
        return 1 if faults else 0
    finally:
        kinds.remove_folder(folder)


def replay(chosen: list[Kind], which: str) -> int:
    """Try one input in this process, for a debugger: a number, or a file that was kept."""
    name, _, number = which.partition(":")
    kind = next(kind for kind in chosen if kind.name == name)
    data = kind.make(int(number)) if number.isdecimal() else Path(number).read_bytes()
    what = attempt(kind, data)
    print({None: "read", "": "refused"}.get(what, what))
    return 1 if what else 0


def throw(chosen: list[Kind], count: int, keep: Path | None) -> int:
    """Run `count` inputs of each kind, print a line for each, then the faults; count those."""
    print(HEAD)
    whole, faults = Tally(), 0
    for kind, tally in run_all(chosen, count, os.cpu_count() or 1):
        print(row(kind.name, tally), flush=True)
        whole.add(tally)
        for number, what in tally.faults[:SHOWN]:
            print(f"  {kind.name}:{number}: {what}", flush=True)
            if keep:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{kind.name.replace(' ', '-')}-{number}").write_bytes(kind.make(number))
        faults += len(tally.faults)
    print(row("all", whole))
    return faults


def row(name: str, tally: Tally) -> str:
    """One line of the table."""
    return (
        f"{name:24}{tally.inputs:9,}{tally.read:9,}{tally.refused:9,}{tally.crashes.total():9,}"
        f"{tally.hangs:7,}{tally.peak >> 10:6,}{tally.slowest:11.2f}"
    )


def strike(count: int, kernel: str | None, folder: Path) -> int:
    """Kill each command its share of `count` times; print a line for each, and count faults."""
    vmlinux = tiny_kernel.build_vmlinux(folder / "vmlinux")
    victims = kills.victims(vmlinux, kernel)
    faults: list[str] = []
    whole = sum(victim.share for victim in victims)
    for victim in victims:
        toll = kills.campaign(victim, -(-count * victim.share // whole), folder)
        print(f"{victim.name:24}{toll}", flush=True)
        faults += toll.faults
    print(*faults[:SHOWN], sep="\n")
    return len(faults)


if __name__ == "__main__":
    sys.exit(main())
