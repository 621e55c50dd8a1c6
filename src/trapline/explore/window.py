"""A window of one guest: its instructions, one by one, and the state at its end."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, NamedTuple

import iced_x86 as ix

from trapline.base.errors import BadInputFileError
from trapline.cpu.engine import Exit, ExitHandler, Reg, Vcpu
from trapline.explore.datamap import DataMap
from trapline.explore.ends import Ends
from trapline.explore.events import conditions, inject
from trapline.explore.places import Step
from trapline.explore.registers import Registers, registers
from trapline.explore.scenario import EndSymbol
from trapline.explore.triggers import Opening
from trapline.guest.frozen import Checkpoint, FrozenMachine
from trapline.guest.target import KERNEL_HALF, Target
from trapline.isa.operands import normalise
from trapline.machine.machine import Machine
from trapline.results.explore import Boundary

_MAX_STEPS: Final = 200_000
_MAX_INSTRUCTION: Final = 15
_GS_BASE: Final = 0xC0000101


class ReferenceEnd(NamedTuple):
    """The compare point, and the machine's state at it."""

    rip: int
    rsp: int
    cpl: int
    registers: Registers


# Of a window that does not close: no stack pointer is odd and negative.
_NEVER: Final = ReferenceEnd(0, -1, 0, ())


class LiveWindow:
    """The window that an opening began, on the machine that is there.

    The machine is at the window's start after construction and after each `rewind`. `leave`
    lets it go on from there. `trouble` says why the window does not close; it has no compare point
    then, and `steps` are those until the guest was dead or patience at an end.
    """

    def __init__(self, machine: Machine, target: Target, opening: Opening) -> None:
        self.machine = machine
        self.target = target
        self.opening = opening
        self.scenario = opening.scenario
        start, end = opening.scenario.start, opening.scenario.end
        is_call = start.symbol is not None and start.interrupt is None
        self.is_return = is_call and end.at == "return"
        self.vcpu: Vcpu = machine.vcpu
        self.counts = False
        self.trouble: BadInputFileError | None = None
        # An injected event takes time, after which a tick would come that the reference run
        # did not have.
        self._holding = ExitStack()
        self._holding.enter_context(machine.apic.holding())
        self._frozen = FrozenMachine(machine)
        self._at: tuple[int, Checkpoint] | None = None
        self._has_exited = False
        # An interrupt that is posted waits at the first boundary, to which it returns: events come
        # in front of it there, as at any ordinary place.
        self.first = int(opening.post not in (None, "nmi"))
        self.rewind()
        self.steps = self._trace()
        self.rewind()
        self.boundaries = tuple(self._describe())
        self.end = self._end
        self.ends: Ends

    def rewind(self) -> None:
        """Go back to the start."""
        self._frozen.restore()
        if self.opening.post is not None:
            self._post(self.opening.post)

    def count(self, *, wanted: bool) -> None:
        """Count instructions from now on, or save the time that this takes."""
        if wanted != self.counts:
            self.counts = wanted
            self.vcpu.exact_counts(wanted)

    def go_to(self, boundary: int, serve: ExitHandler) -> None:
        """Bring the guest before an instruction of the window, as the reference came there.

        It is stepped there from the last boundary that was gone to, or from the start.
        """
        number, checkpoint = (0, None) if self._at is None else self._at
        if checkpoint is None or number > boundary:
            self.rewind()
            number, checkpoint = 0, None
        else:
            self._frozen.return_to(checkpoint)
        if number == boundary and checkpoint is not None:
            return

        def step_exit(exit_: Exit) -> None:
            self._has_exited = True
            serve(exit_)

        self._has_exited = checkpoint is None
        for _ in range(boundary - number):
            self.vcpu.step(step_exit)
        before = None if self._has_exited else checkpoint
        self._at = boundary, self._frozen.checkpoint(self.pages_written(), before)

    @contextmanager
    def detour(self) -> Iterator[None]:
        """Go elsewhere, and have what `go_to` starts from be what it was."""
        at = self._at
        try:
            yield
        finally:
            self._at = at

    def cut(self, steps: int) -> None:
        """Forget what came after that many instructions."""
        self.steps = self.steps[:steps]
        self.boundaries = self.boundaries[:steps]

    def leave(self) -> None:
        """Go back, and on from there as if there had been no window."""
        self._frozen.restore()
        self._holding.close()
        self.vcpu.set_instruction_budget(None)
        self.vcpu.set_breakpoints(frozenset())
        self.count(wanted=False)

    def _post(self, event: str) -> None:
        """Post the event that opens the window.

        An interrupt waits for the window's first step, so that there is a boundary in front of it.
        An NMI is delivered: the window begins with its handler.
        """

        def until_delivered(exit_: Exit) -> None:
            self.serve(exit_)
            if exit_ is Exit.NMI_WINDOW:
                self.vcpu.stop()

        inject(self.machine, event)
        if event == "nmi":
            self.vcpu.run(until_delivered)
            self.vcpu.step(self.serve)

    def serve(self, exit_: Exit) -> None:
        """Have the module serve an exit, with timers held."""
        if exit_ in (Exit.ENTRY, Exit.IRET):
            return  # for whoever watches
        self.machine.module.on_exit(exit_)

    def pages_written(self) -> list[int]:
        """Return the GPAs of pages written since the start."""
        return self.vcpu.memory.written_pages()

    def finish_reference(self, end: ReferenceEnd) -> None:
        """Take the state that the machine is in as the reference's end."""
        self.end = end
        data = DataMap(self.target, self.vcpu)
        self.ends = Ends(self.vcpu, data, self.pages_written(), end.cpl)

    def step_at(self, boundary: int) -> Step:
        """Return the state before an instruction, or that at the compare point."""
        return self.last_step if boundary == len(self.steps) else self.steps[boundary]

    def step(self) -> Step:
        """Describe the instruction that the machine is at."""
        regs, vcpu = self.vcpu.regs, self.vcpu
        return Step(
            rip=int(regs[Reg.RIP]),
            rsp=int(regs[Reg.RSP]),
            cpl=vcpu.cpl,
            is_kernel_gs=vcpu.msr(_GS_BASE) >= KERNEL_HALF,
            conditions=conditions(self.machine),
        )

    def is_end(self) -> bool:
        """Whether the machine is at the compare point."""
        regs = self.vcpu.regs
        end = self.end
        return bool(
            regs[Reg.RIP] == end.rip and regs[Reg.RSP] == end.rsp and self.vcpu.cpl == end.cpl
        )

    def here(self) -> ReferenceEnd:
        """Describe where the machine is."""
        regs = self.vcpu.regs
        return ReferenceEnd(
            int(regs[Reg.RIP]), int(regs[Reg.RSP]), self.vcpu.cpl, registers(self.machine)
        )

    # The trace.

    def _trace(self) -> tuple[Step, ...]:
        vcpu = self.vcpu
        closed = self._closing()
        steps: list[Step] = []
        texts: dict[int, str] = {}
        while len(steps) < self.first or not closed():
            rip = int(vcpu.regs[Reg.RIP])
            if rip not in texts:
                texts[rip] = instruction_text(self.vcpu, rip)
            steps.append(self.step())
            if len(steps) > _MAX_STEPS or self.machine.host.outcome is not None:
                self.trouble = self._endless(len(steps))
                break
            vcpu.step(self.serve)
        if not steps:
            raise BadInputFileError(
                f"scenario {self.scenario.name}: its window is empty; the end is where it starts."
            )
        self._texts = texts
        self._end = self.here() if self.trouble is None else _NEVER
        self.last_step = self.step()
        return tuple(steps)

    def _closing(self) -> Callable[[], bool]:
        """Return what tells that the window has closed."""
        vcpu, module = self.vcpu, self.machine.module
        at = self.scenario.end.at
        if isinstance(at, EndSymbol):
            address = self.target.address(at.symbol)
            return lambda: vcpu.regs[Reg.RIP] == address
        if at == "veinfo-get":
            return lambda: module.ve_info is None
        if at == "user":
            return lambda: vcpu.cpl == 3
        rsp, cpl = self.opening.rsp, self.opening.cpl
        return lambda: vcpu.regs[Reg.RSP] == rsp and vcpu.cpl == cpl

    def _endless(self, steps: int) -> BadInputFileError:
        why = "ends with the guest" if self.machine.host.outcome is not None else "never closes"
        return BadInputFileError(
            f"scenario {self.scenario.name}: its window {why} ({steps:,} instructions); choose "
            "another start or end."
        )

    # Names.

    def _describe(self) -> "list[Boundary]":
        seen: Counter[int] = Counter()
        found = []
        for index, step in enumerate(self.steps):
            location = self.target.symbols.locate(step.rip, is_user=step.cpl == 3)
            found.append(
                Boundary(
                    index=index,
                    function=location.function or location.label,
                    offset=location.offset,
                    ordinal=seen[step.rip],
                    instruction=self._texts[step.rip],
                )
            )
            seen[step.rip] += 1
        return found


def instruction_text(vcpu: Vcpu, rip: int) -> str:
    """Disassemble the instruction at an address, without what moves from build to build."""
    for size in (_MAX_INSTRUCTION, -rip % 4096):
        data = vcpu.read(rip, size) if size else None
        if data:
            instruction = ix.Decoder(64, data, ip=rip).decode()
            if not instruction.is_invalid:
                return normalise(instruction)
    return "(bad)"
