"""Measures whether explore sees damage: a bit flipped behind the kernel's back after each event.

    python benchmarks/sensitivity.py [KERNEL] [TRIALS]

KERNEL is as for `trapline explore`; default: Debian's 6.12 cloud kernel, fetched with apt. For each
trial an event of a shipped scenario comes at a random boundary, and a random bit of a page that a
run writes is flipped right behind it. Dead stack and words that follow the clock are left out. What
the guest wrote over is told apart: nothing can see it. Asked for: of those bits that are still
there at the compare point, 99 % found. Ends with 1 below that.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator

from explore import DEFAULT_KERNEL, configuration
from trapline.explore.course import Run
from trapline.explore.ends import Taken
from trapline.explore.stage import Stage
from trapline.results.explore import CLEAN

SCENARIOS = ("syscall-gap", "swapgs-gap", "nmi-in-ve", "irq-in-ve")
TRIALS = 1_000
ASKED = 0.99
WORD = 8
PAGE = 4096


class Saboteur:
    """Flips bits in the window that a stage has open."""

    def __init__(self, stage: Stage) -> None:
        # No product needs to be damaged: there is no other way in.
        assert stage._injector is not None  # noqa: SLF001
        assert stage._window is not None  # noqa: SLF001
        self.injector, self.window = stage._injector, stage._window  # noqa: SLF001
        self.oracle, self.runs = self.injector._oracle, self.injector._runs  # noqa: SLF001
        self.inject, self.take = self.runs._inject, self.runs._take  # noqa: SLF001
        self.last = 0

    def pages(self, event: str) -> list[int]:
        """List the pages that a run of the event writes, or the reference does."""
        taken = self.runs.end(Run(event, len(self.window.steps) // 2), 0)
        return [] if taken is None else taken.pages

    def trial(self, run: Run, gpa: int, bit: int) -> str | None:
        """Say what became of a bit: "found", "missed" or "overwritten"; None if it is no trial."""
        if self.oracle.prepare(run).covers(gpa):
            return None
        ram = self.window.vcpu.memory.ram

        def flip(event: str) -> None:
            self.inject(event)
            if self.runs._before[0] == run.boundary:  # noqa: SLF001
                ram[gpa + bit // 8] ^= 1 << bit % 8
                self.window.vcpu.memory.code_changed(gpa, WORD)

        sound, before = self._run(run, gpa, self.inject)
        if sound not in CLEAN:
            return None
        verdict, after = self._run(run, gpa, flip)
        if verdict not in CLEAN:
            return "found"
        return "overwritten" if before == after else "missed"

    def _run(self, run: Run, gpa: int, inject: Callable[[str], None]) -> tuple[str, int]:
        """Run and judge; return the verdict, and what the word holds at the compare point."""
        seen: list[int] = []

        def take() -> Taken:
            ram = self.window.vcpu.memory.ram
            seen.append(int.from_bytes(ram[gpa : gpa + WORD], "little"))
            return self.take()

        # What was learnt from this very run is not asked for again.
        known = self.oracle.known
        self.oracle.known = lambda _: None  # type: ignore[method-assign]
        self.runs._inject, self.runs._take = inject, take  # type: ignore[method-assign]  # noqa: SLF001
        try:
            verdict = self.injector.run(run).verdict
        finally:
            self.oracle.known = known  # type: ignore[method-assign]
            self.runs._inject, self.runs._take = self.inject, self.take  # type: ignore[method-assign]  # noqa: SLF001
        return verdict, seen[0] if seen else 0


def trials(stage: Stage, count: int, dice: random.Random) -> Iterator[str]:
    """Yield what came of so many trials in the window that is open."""
    saboteur = Saboteur(stage)
    window = saboteur.window
    pages = {one.event: saboteur.pages(one.event) for one in window.scenario.inject}
    events = [event for event, found in pages.items() if found and not event.startswith("ve:")]
    done = 0
    while done < count:
        event = dice.choice(events)
        run = Run(event, dice.randrange(len(window.steps)))
        gpa = dice.choice(pages[event]) + WORD * dice.randrange(PAGE // WORD)
        outcome = saboteur.trial(run, gpa, dice.randrange(8 * WORD))
        if outcome is not None:
            done += 1
            yield outcome


def main() -> int:
    """Print all of it."""
    kernel = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_KERNEL
    count = int(sys.argv[2]) if len(sys.argv) > 2 else TRIALS
    dice = random.Random(1)
    total: Counter[str] = Counter()
    with Stage(configuration(kernel, *SCENARIOS)) as stage:
        for plan in stage.plans():
            here = Counter(trials(stage, count // len(SCENARIOS), dice))
            print(f"{plan.window.scenario}: {dict(here)}", flush=True)
            total += here
    visible = total["found"] + total["missed"]
    share = total["found"] / visible if visible else 0.0
    print(
        f"{total.total():,} bits flipped: {total['overwritten']:,} written over by the guest; of "
        f"{visible:,} others {total['found']:,} found ({share:.2%})"
    )
    return 0 if share >= ASKED else 1


if __name__ == "__main__":
    sys.exit(main())
