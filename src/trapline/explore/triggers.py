"""Runs a guest until one of several scenarios begins."""

from collections.abc import Iterable
from typing import Final, NamedTuple

from trapline.cpu.engine import Exit, Reg
from trapline.explore.gates import ways_in
from trapline.explore.scenario import EACH, EndSymbol, Scenario, Start, of_vector
from trapline.guest.target import Target
from trapline.machine.machine import Machine
from trapline.tdx.vmm_interface import TrapListener, VeInfo, trap_class

# How far up the stack `within` looks for a return address.
_STACK_SEARCH: Final = 4096
_RFLAGS_IF: Final = 1 << 9
_USER: Final = 3


class Opening(NamedTuple):
    """A window that is open: the guest is before its first instruction.

    `rsp` and `cpl` are those that come back when the window closes by return. With `post`, the
    guest is before the instruction that this event is to interrupt. `is_one_of`: the scenario is
    one of those that stand for all entries.
    """

    scenario: Scenario
    rsp: int
    cpl: int
    post: str | None = None
    is_one_of: bool = False


class _Waiting:
    """One scenario that has not begun."""

    def __init__(self, scenario: Scenario, target: Target) -> None:
        self.scenario = scenario
        self.start: Start = scenario.start
        self.left = scenario.start.nth
        self.is_counting = scenario.start.after is None
        spans = (target.span(name) for name in self.start.within_any)
        self.within = tuple(span for span in spans if span is not None)

    def is_within(self, address: int) -> bool:
        return any(address in span for span in self.within)


class Triggers(TrapListener):
    """Watches one machine; call `next` until it gives None. Nothing is `lacking`.

    It puts itself between engine and module while `next` runs.
    """

    def __init__(self, machine: Machine, target: Target, scenarios: Iterable[Scenario]) -> None:
        self._machine = machine
        self._vcpu = machine.vcpu
        self._target = target
        self._waiting = [_Waiting(scenario, target) for scenario in scenarios]
        self._returns: dict[int, list[_Waiting]] = {}  # user addresses at which one opens
        self._addresses: dict[str, int] = {}
        for name in (name for w in self._waiting for name in names_of(w.start, target)):
            address = target.address(name)
            assert address is not None  # see `lacking`
            self._addresses[name] = address
        self._opening: Opening | None = None
        self._ready: list[Opening] = []
        self._trap: str | None = None
        self._frame = (0, 0)  # RSP and CPL before the event at hand
        # Without a console, which most scenarios do not have, a panic is silent and never ends.
        self._panics = frozenset(target.addresses(target.names.panic))
        machine.host.start()

    def next(self) -> Opening | None:
        """Run on to the next window; None when the guest ends first."""
        if self._ready:
            # Begins where the one before began, and the machine is there again.
            return self._ready.pop(0)
        vcpu, module = self._vcpu, self._machine.module
        self._opening = None
        with module.listening(self):
            while self._waiting and self._machine.host.outcome is None:
                vcpu.set_breakpoints(self._breakpoints())
                vcpu.run(self._on_exit)
                if self._opening is not None:
                    if self._opening.scenario.start.trap is not None:
                        vcpu.step(module.on_exit)  # to the handler's first instruction
                    break
        vcpu.set_breakpoints(frozenset())
        return self._opening

    @property
    def missing(self) -> tuple[Scenario, ...]:
        """The scenarios whose start was not seen."""
        return tuple(waiting.scenario for waiting in self._waiting)

    # vmm_interface.TrapListener

    def on_ve(self, rip: int, info: VeInfo, *, double_fault: bool) -> None:
        """Note a #VE; it is not delivered yet."""
        del rip, double_fault
        self._trap = trap_class(info.reason)
        self._frame = self._here()

    def on_tdcall(self, rip: int, leaf: int, status: int) -> None:
        """Do nothing: no window begins here."""

    def on_tdvmcall(self, rip: int, registers: list[int]) -> None:
        """Do nothing: no window begins here."""

    def _here(self) -> tuple[int, int]:
        return int(self._vcpu.regs[Reg.RSP]), self._vcpu.cpl

    def _breakpoints(self) -> frozenset[int]:
        waited_for = (self._addresses[name] for _, name in self._named())
        return frozenset((*waited_for, *self._returns, *self._panics))

    def _named(self) -> list[tuple[_Waiting, str]]:
        """List the symbols that are waited for now."""
        named = []
        for waiting in self._waiting:
            names = names_of(waiting.start, self._target)
            if not waiting.is_counting:
                named.append((waiting, names[0]))
            elif len(names) > (waiting.start.after is not None) and not self._returns_to(waiting):
                named.append((waiting, names[-1]))
        return named

    def _returns_to(self, waiting: _Waiting) -> bool:
        return any(waiting in returning for returning in self._returns.values())

    def _on_exit(self, exit_: Exit) -> None:
        """Serve an exit, and look whether it begins a window."""
        if exit_ is Exit.BREAKPOINT:
            if self._vcpu.regs[Reg.RIP] in self._panics:
                self._machine.panics(int(self._vcpu.regs[Reg.RDI]))
            else:
                self._on_breakpoint()
            return
        self._trap = None
        self._machine.module.on_exit(exit_)
        if self._trap is not None:
            self._count_traps(self._trap)

    def _on_breakpoint(self) -> None:
        regs = self._vcpu.regs
        rip = int(regs[Reg.RIP])
        rsp, cpl = self._here()
        if cpl == 3 and rip in self._returns:
            for waiting in self._returns.pop(rip):
                self._post(waiting, rsp, cpl)
            return
        for waiting, name in self._named():
            start = waiting.start
            if not waiting.is_counting:
                if self._addresses[name] == rip:
                    waiting.is_counting = True
                    self._vcpu.stop()  # for other breakpoints
                continue
            number = start.syscall if isinstance(start.syscall, int) else None
            if (
                self._addresses[name] != rip
                or (number is not None and number != regs[Reg.RAX])
                or not self._counts(waiting)
                or not self._ends_count(waiting)
            ):
                continue
            self._reach(waiting, rsp, cpl)

    def _reach(self, waiting: _Waiting, rsp: int, cpl: int) -> None:
        """Open the window of a start that the guest is at, or when its system call has returned."""
        start = waiting.start
        if start.interrupt is not None and start.symbol is not None:
            self._post(waiting, rsp, cpl)
        elif start.interrupt is not None:
            # SYSCALL has put the address it returns to into RCX.
            self._returns.setdefault(int(self._vcpu.regs[Reg.RCX]), []).append(waiting)
            self._vcpu.stop()
        elif start.syscall is not None:
            self._open(waiting, rsp, 3)
        elif start.nmi is not None:
            self._open(waiting, rsp, cpl, "nmi")
        else:
            self._open(waiting, rsp + 8, cpl)

    def _count_traps(self, trap: str) -> None:
        for waiting in list(self._waiting):
            if (
                waiting.start.trap in (trap, "any")
                and self._counts(waiting)
                and self._ends_count(waiting)
            ):
                self._open(waiting, *self._frame)

    def _counts(self, waiting: _Waiting) -> bool:
        """Whether what happens is of the kind that the start is about."""
        if not waiting.is_counting:
            return False
        wanted = waiting.start.interrupts
        if wanted is not None and wanted != bool(self._vcpu.rflags & _RFLAGS_IF):
            return False
        if waiting.start.user is not None and waiting.start.user != (self._vcpu.cpl == _USER):
            return False
        if not waiting.start.within_any:
            return True
        rsp = int(self._vcpu.regs[Reg.RSP])
        size = min(_STACK_SEARCH, -rsp % _STACK_SEARCH or _STACK_SEARCH)
        for start, length in ((rsp, size), (rsp + size, _STACK_SEARCH)):
            data = self._vcpu.read(start, length & -8)
            if data and any(map(waiting.is_within, memoryview(data).cast("Q"))):
                return True
        return waiting.is_within(int(self._vcpu.regs[Reg.RIP]))

    @staticmethod
    def _ends_count(waiting: _Waiting) -> bool:
        waiting.left -= 1
        return waiting.left <= 0

    def _post(self, waiting: _Waiting, rsp: int, cpl: int) -> None:
        """Open the window of the interrupt that is to be posted here, or that of each."""
        scenario, interrupt = waiting.scenario, waiting.start.interrupt
        if interrupt != EACH:
            self._open(waiting, rsp, cpl, f"irq:{interrupt}")
            return
        self._waiting.remove(waiting)
        for vector in ways_in(self._vcpu):
            one = Opening(of_vector(scenario, vector), rsp, cpl, f"irq:{vector:#x}", is_one_of=True)
            self._begin(one)

    def _open(self, waiting: _Waiting, rsp: int, cpl: int, post: str | None = None) -> None:
        opening = Opening(waiting.scenario, rsp, cpl, post)
        self._waiting.remove(waiting)
        self._begin(opening)

    def _begin(self, opening: Opening) -> None:
        if self._opening is None:
            self._opening = opening
        else:
            self._ready.append(opening)
        self._vcpu.stop()


def names_of(start: Start, target: Target) -> tuple[str, ...]:
    """Name the symbols that a start is told by, `after` first."""
    name = start.symbol or start.nmi
    if start.syscall is not None or (start.interrupt is not None and name is None):
        name = target.names.syscall
    return tuple(n for n in (start.after, name) if n is not None)


def lacking(scenario: Scenario, target: Target) -> str | None:
    """Name what a scenario needs and the kernel does not have; None if it has all."""
    names = list(names_of(scenario.start, target))
    if isinstance(scenario.end.at, EndSymbol):
        names.append(scenario.end.at.symbol)
    within = scenario.start.within_any
    if within and not any(target.span(name) for name in within):
        names.append(within[0])
    return next((name for name in names if target.address(name) is None), None)
