"""Explores many kernels by the rules, and prints one table of what came.

    python benchmarks/explore_kernels.py [--limit N] [--workers N] [KERNEL...]

KERNEL is as for `trapline explore`, or `built:NAME` for one of kernels/ that tools/build-kernel has
built (one that is not built is told, and not built), or `fetched:SUITE/PACKAGE` for one that
tools/fetch-kernel fetches.
Default: all that trapline is held against. A row for each scenario: runs, and how many came to
which verdict; one for `entries`, however many ways a kernel has. What the kernel was not tried
with, and each kind of finding, is listed below its rows. A kernel that cannot be explored is told
with the reason. Ends with 1 if a run went wrong.
"""

import argparse
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import trapline
from trapline.base.errors import TraplineError
from trapline.results.explore import CLEAN, SEVERITY, ExploreResult

ROOT = Path(__file__).parents[1]
CACHE = Path.home() / ".cache" / "trapline" / "kernels"
CLOUD = "linux-image-cloud-amd64"
KERNELS = (
    f"deb:linux-image-6.12-cloud-amd64|{CLOUD}",
    "deb:linux-image-6.12-amd64|linux-image-amd64",
    "deb:linux-image-6.12-rt-amd64|linux-image-rt-amd64",
    *(f"fetched:{suite}/{CLOUD}" for suite in ("trixie", "sid", "trixie-backports")),
    *(
        f"built:{path.stem}"
        for path in sorted((ROOT / "kernels").glob("*.config"))
        if path.stem != "base"
    ),
)


def path_of(kernel: str) -> str:
    """Return what `trapline explore` takes. Raises TraplineError for what is not there."""
    kind, _, name = kernel.partition(":")
    if kind == "built":
        tree = CACHE / name / "build"
        if not (tree.parent / "key").exists():
            raise TraplineError(f"not built; tools/build-kernel {name} does")
        return str(tree)
    if kind == "fetched":
        command = [ROOT / "tools" / "fetch-kernel", *name.split("/")]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if run.returncode:
            raise TraplineError("cannot be fetched")
        return run.stdout.strip()
    return kernel


def rows(result: ExploreResult) -> dict[str, Counter[str]]:
    """Count the verdicts of each scenario; those of `entries` in one."""
    found: dict[str, Counter[str]] = {}
    for name, counts in result.counts.items():
        found.setdefault(name.partition(":")[0], Counter()).update(counts)
    return found


def notes(result: ExploreResult) -> list[str]:
    """Say what was not tried, what is expected to end badly, and what went wrong."""
    told = [f"{one.scenario} not tried: {one.why}" for one in result.not_opened]
    reasons = {
        f"{one.event} not tried: {one.why}" for window in result.windows for one in window.not_tried
    }
    kinds: Counter[str] = Counter()
    for one in result.results:
        if one.verdict not in CLEAN:
            what = "as expected" if one.expected else "WRONG"
            kinds[f"{one.scenario} {one.event} {one.verdict} ({what}): {one.detail[:120]}"] += 1
    return [*told, *sorted(reasons), *(f"{count} x {kind}" for kind, count in kinds.items())]


def explored(kernel: str, limit: int | None, workers: int | None) -> int:
    """Explore one kernel, print its rows, and return how many runs went wrong."""
    start = time.monotonic()
    try:
        result = trapline.explore(path_of(kernel), limit=limit, workers=workers)
    except TraplineError as error:
        print(f"| {kernel} | not explored: {error} | | | |", flush=True)
        return 0
    seconds = time.monotonic() - start
    wrong = sum(one.verdict not in CLEAN and not one.expected for one in result.results)
    for scenario, counts in sorted(rows(result).items()):
        told = ", ".join(f"{counts[one]:,} {one}" for one in SEVERITY if counts[one])
        print(f"| {kernel} | {scenario} | {counts.total():,} | {told} | |")
    ways = sum(one.scenario.startswith("entries:") for one in result.windows)
    all_ = f"all, {ways} ways in"
    print(f"| **{kernel}** | {all_} | {result.injected:,} | {wrong} wrong | {seconds:.0f} |")
    for note in notes(result):
        print(f"<!-- {note} -->")
    sys.stdout.flush()
    return wrong


def main() -> int:
    """Explore what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", type=int, help="boundaries of each window and event")
    parser.add_argument("--workers", type=int)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", default=KERNELS)
    arguments = parser.parse_args()
    print("| kernel | scenario | runs | verdicts | s |")
    print("|---|---|---|---|---|", flush=True)
    wrong = sum(explored(each, arguments.limit, arguments.workers) for each in arguments.kernels)
    print(f"\n{wrong} runs went wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
