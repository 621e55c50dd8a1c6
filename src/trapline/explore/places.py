"""Ordinary places: boundaries at which any kernel must take any event of its host.

That is user mode, and kernel code with interrupts on, on the kernel's GS base, outside the code
that is entered half, while no NMI is blocked and no VE_INFO waits to be collected.
"""

from collections.abc import Sequence
from typing import NamedTuple

from trapline.explore.events import Conditions
from trapline.guest.target import Target
from trapline.linux import names


class Step(NamedTuple):
    """The state before one instruction of the reference run."""

    rip: int
    rsp: int
    cpl: int
    is_kernel_gs: bool
    conditions: Conditions


class Places:
    """The ordinary places of a window, in order.

    `steps` are the window's, with the one before which it closes.
    """

    def __init__(self, target: Target, steps: Sequence[Step]) -> None:
        self._entry = entry_code(target)
        self.modes = {i: step.cpl for i, step in enumerate(steps) if self._is_ordinary(step)}
        self.all = tuple(self.modes)
        self._by_mode = {
            mode: tuple(i for i, its in self.modes.items() if its == mode)
            for mode in set(self.modes.values())
        }

    def of_mode(self, place: int) -> tuple[int, ...]:
        """Return the places of the same mode as this one; handlers' accounts differ by it."""
        return self._by_mode[self.modes[place]]

    def _is_ordinary(self, step: Step) -> bool:
        held = step.conditions
        if held.ve_valid or held.nmi_blocked or held.shadow:
            return False
        if step.cpl == 3:
            return True
        return (
            held.interrupt_flag
            and step.is_kernel_gs
            and not any(step.rip in code for code in self._entry)
        )


def entry_code(target: Target) -> tuple[range, ...]:
    """Return where the kernel has its entry code; nothing if it has no sections for it."""
    bounds = ((target.address(a), target.address(b)) for a, b in names.ENTRY_TEXT)
    return tuple(range(a, b) for a, b in bounds if a is not None and b is not None)
