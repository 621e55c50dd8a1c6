"""What is shown of a run that went wrong: names, instructions, the last state, how to repeat it."""

from collections.abc import Iterator
from typing import Final

from trapline.boot.trace import describe
from trapline.cpu.engine import Reg
from trapline.explore.course import Run
from trapline.explore.window import LiveWindow, instruction_text
from trapline.machine.machine import Machine
from trapline.machine.observe.lastwords import take_splat
from trapline.results.splat import Splat

_TRAPS: Final = 8


class Evidence:
    """Describes one window. `reproduce` is the command line up to the scenario."""

    def __init__(self, window: LiveWindow, reproduce: str) -> None:
        self._window = window
        self._vcpu = window.vcpu
        self._reproduce = reproduce

    def instruction(self) -> str:
        """Describe the instruction at hand."""
        rip = int(self._vcpu.regs[Reg.RIP])
        is_user = self._vcpu.cpl == 3
        return f"{self.label(rip, is_user=is_user)}: {instruction_text(self._vcpu, rip)}"

    def label(self, rip: int, *, is_user: bool = False) -> str:
        """Name the place of an address."""
        return self._window.target.symbols.locate(rip, is_user=is_user).label

    def splat(self, banner: str, run: Run | None = None) -> Splat:
        """Describe the state that the guest is in, after a run or the reference's."""
        return take_splat(
            self._vcpu,
            self._window.target.symbols,
            banner=banner,
            injected=() if run is None else tuple(self._announce(run)),
            traps=trap_lines(self._window.machine),
            reproduce=self.command(run),
        )

    def _announce(self, run: Run) -> Iterator[str]:
        boundary = self._window.boundaries[run.boundary]
        yield (
            f"{run.event} before instruction {run.boundary} of {self._window.scenario.name}, "
            f"{boundary.function}+{boundary.offset:#x} ({boundary.instruction})"
        )
        if run.nested is not None:
            yield f"{run.nested} {run.nested_at} instructions later"

    def command(self, run: Run | None) -> str:
        """Return the command line that does a run again, or, without one, opens the window."""
        if run is None:
            return self._reproduce
        event, at = run.event, str(run.boundary)
        if run.nested is not None:
            event, at = f"{event},{run.nested}", f"{at},{run.nested_at}"
        return f"{self._reproduce} --event {event} --at {at}"


def trap_lines(machine: Machine) -> tuple[str, ...]:
    """Describe the last traps, one a line."""
    return tuple(
        " ".join(f"{name}={value}" for name, value in describe(trap).items())
        for trap in list(machine.recorder.last)[-_TRAPS:]
    )
