"""Watches one run of a window, and says how it ended.

What ends a run: the compare point, a fault that no kernel survives, a kernel that gives up on
itself, a TD exit, a handler that runs with what belongs to user mode, or the budget. The first
of these stands, but for an oops: a kernel that survives it may still panic.
"""

from collections import Counter
from collections.abc import Collection
from typing import Final, NamedTuple

from trapline.cpu.engine import Exit, Reg
from trapline.explore.gates import Gate
from trapline.explore.way import Underway, Way
from trapline.explore.window import LiveWindow
from trapline.guest.target import KERNEL_HALF
from trapline.machine.outcome import OutcomeKind
from trapline.machine.vmm.ghci import TdVmCall
from trapline.results.explore import Verdict
from trapline.tdx.vmm_interface import TrapListener, VeInfo

_VECTOR_NMI: Final = 2
_VECTOR_DF: Final = 8
_VECTOR_VE: Final = 20
_GS_BASE: Final = 0xC0000101
# How long a kernel that has oopsed may take to panic.
_AFTER_OOPS: Final = 300_000
# MR.RTMR.EXTEND, MR.REPORT, MEM.PAGE.ACCEPT.
_WRITING_TDCALLS: Final = frozenset({2, 4, 6})
_WRITING_TDVMCALLS: Final = frozenset({TdVmCall.MAP_GPA, TdVmCall.GET_QUOTE})

OUTCOMES: Final[dict[OutcomeKind, Verdict]] = {
    OutcomeKind.FATAL_ERROR: "panic",
    OutcomeKind.PANIC: "panic",
    OutcomeKind.DOUBLE_FAULT: "double-fault",
    OutcomeKind.TRIPLE_FAULT: "triple-fault",
    OutcomeKind.EPT_VIOLATION: "td-exit",
    OutcomeKind.TD_DEAD: "td-exit",
    OutcomeKind.RESET: "td-exit",
    OutcomeKind.POWERED_OFF: "td-exit",
    OutcomeKind.HANG: "hang",
    OutcomeKind.CONSOLE_FLOOD: "hang",
}


class Ending(NamedTuple):
    """How a run ended; `verdict` is None at the compare point."""

    verdict: Verdict | None
    detail: str


class Delivery(NamedTuple):
    """An event that was delivered: when, in instructions, and what it interrupted."""

    vector: int
    instructions: int
    rip: int
    rsp: int
    rflags: int


class Passed(NamedTuple):
    """What a run went through: how often each vector was delivered, and the traps still handled."""

    counts: Counter[int]
    traps: Underway | None  # None: those of the window's start


class Watch(TrapListener):
    """The exit handler of a run. `ending` is set when the run is over."""

    def __init__(self, window: LiveWindow) -> None:
        self._window = window
        self._machine = window.machine
        self._vcpu = window.vcpu
        target = window.target
        names = target.names
        self._oops = target.addresses(names.oops)
        self._panic = target.addresses(names.panic)
        self._handlers = target.handlers
        self._end_rip = window.end.rip
        self.breakpoints = frozenset({self._end_rip, *self._oops, *self._panic})
        self.entries = frozenset(self._handlers)
        self._gates: dict[int, bool] = {}
        self.way = Way(window)
        self.reset()

    @property
    def passed(self) -> Passed:
        """What the run at hand went through so far."""
        return Passed(self.counts.copy(), self.way.traps)

    def reset(self, passed: Passed | None = None) -> None:
        """Forget the run before; `passed` is what this one went through before it begins."""
        self.way.begin(None if passed is None else passed.traps)
        self.ending: Ending | None = None
        self.ends_at_oops = False  # rather than to see whether a panic follows
        self._oopsed: str | None = None
        self.counts: Counter[int] = Counter() if passed is None else passed.counts.copy()
        self._deliveries: list[Delivery] = []
        self._ends_at: int | None = None

    def stop_at(self, instructions: int) -> None:
        """End the stretch at hand, without an ending, when so many have retired."""
        self._ends_at = instructions
        self._arm()

    def _arm(self) -> None:
        """Ask for an exit when the stretch at hand ends.

        Without counting, `Vcpu.instructions` is told from code bytes, which a time budget
        goes by; but the host sets that, too.
        """
        if self._ends_at is None:
            return
        left = self._ends_at - self._vcpu.instructions
        if self._window.counts:
            self._vcpu.set_instruction_budget(left)
        else:
            self._vcpu.set_time_budget(left)

    def finish(self, verdict: Verdict | None, detail: str = "") -> None:
        """End the run."""
        if self.ending is None:
            if self._oopsed is not None and verdict not in ("panic", "privilege", "double-fault"):
                verdict, detail = "oops", self._oopsed
            self.ending = Ending(verdict, detail)
        self._vcpu.stop()

    def on_exit(self, exit_: Exit) -> None:
        """Serve one exit."""
        vcpu = self._vcpu
        if exit_ in (Exit.BREAKPOINT, Exit.ENTRY, Exit.IRET):
            self._on_watched(exit_, int(vcpu.regs[Reg.RIP]))
            return
        if (
            exit_ is Exit.BOUNDARY
            and self._ends_at is not None
            and vcpu.instructions >= self._ends_at
        ):
            vcpu.stop()
            return
        if exit_ is Exit.EXCEPTION and vcpu.fault.vector == _VECTOR_DF:
            self.finish("double-fault", "The processor makes a fault in a fault a double fault.")
            return
        pending = None
        if exit_ is Exit.INTERRUPT_WINDOW:
            pending = self._machine.apic.pending()
        elif exit_ is Exit.NMI_WINDOW and self._nmi_is_due():
            pending = _VECTOR_NMI
        is_interrupt = exit_ is Exit.INTERRUPT_WINDOW
        if pending is not None and not self.note_delivery(pending, is_interrupt=is_interrupt):
            return
        self._window.serve(exit_)
        if not self._window.counts:
            self._arm()
        outcome = self._machine.host.outcome
        if outcome is not None and self.ending is None:
            self.finish(OUTCOMES.get(outcome.kind, "hang"), outcome.detail)

    def _on_watched(self, exit_: Exit, rip: int) -> None:
        """Look at a place that is watched; nobody has to serve it."""
        if exit_ is Exit.BREAKPOINT:
            self._on_breakpoint(rip)
        elif exit_ is Exit.ENTRY:
            self._check_entry(rip)
        else:
            self._is_misstep(self.way.iret())

    def _nmi_is_due(self) -> bool:
        """Whether the module delivers an NMI here: one that it holds, with VE_INFO free."""
        module = self._machine.module
        return module.nmi_pending and module.ve_info is None

    def note_delivery(self, vector: int, *, is_interrupt: bool = False) -> bool:
        """Note that an event is about to be delivered; False when that ends the run."""
        vcpu = self._vcpu
        self.counts[vector] += 1
        rsp = int(vcpu.regs[Reg.RSP])
        self._deliveries.append(
            Delivery(vector, vcpu.instructions, int(vcpu.regs[Reg.RIP]), rsp, vcpu.rflags)
        )
        if vcpu.cpl == 0 and rsp < KERNEL_HALF and not self._has_stack(vector):
            self.finish(
                "privilege",
                f"Vector {vector} has no stack of its own: at CPL 0 its frame goes to RSP "
                f"{rsp:#x}, which belongs to user mode.",
            )
            return False
        return not self._is_misstep(self.way.deliver(vector, is_interrupt=is_interrupt))

    def _is_misstep(self, detail: str | None) -> bool:
        """End the run if there is something to say of its way."""
        if detail is not None:
            self.finish("misstep", detail)
        return detail is not None

    def after(self, vectors: Collection[int], instructions: int) -> list[Delivery]:
        """Return what was delivered of these vectors from a count of instructions on."""
        return [
            one
            for one in self._deliveries
            if one.vector in vectors and one.instructions >= instructions
        ]

    def _has_stack(self, vector: int) -> bool:
        """Whether the gate of a vector switches stacks (IST)."""
        if vector not in self._gates:
            gate = Gate.read(self._vcpu, vector)
            self._gates[vector] = gate is not None and bool(gate.ist)
        return self._gates[vector]

    def _on_breakpoint(self, rip: int) -> None:
        if rip == self._end_rip and self._window.is_end():
            if not self.is_deliverable() and not self._is_misstep(self.way.end()):
                self.finish(None)
            return
        if rip in self._panic:
            self.finish("panic", f"{self._caller()} calls {self._panic[rip]}().")
        elif rip in self._oops and self._oopsed is None:
            self._oopsed = f"{self._caller()} calls {self._oops[rip]}()."
            if self.ends_at_oops:
                self.finish("oops", self._oopsed)
            elif self._ends_at is not None:
                self.stop_at(min(self._ends_at, self._vcpu.instructions + _AFTER_OOPS))

    def _caller(self) -> str:
        """Name the function whose call has just been made."""
        data = self._vcpu.read(int(self._vcpu.regs[Reg.RSP]), 8)
        address = int.from_bytes(data, "little") if data else 0
        location = self._window.target.symbols.locate(address, is_call=True)
        return f"{location.function}()" if location.function else "The kernel"

    def is_deliverable(self) -> bool:
        """Whether an event waits that comes before the instruction at hand."""
        vcpu = self._vcpu
        if self._nmi_is_due() and not vcpu.nmi_blocked:
            return True
        return self._machine.apic.pending() is not None and bool(
            vcpu.rflags & 1 << 9 and not vcpu.interrupt_shadow
        )

    def _check_entry(self, rip: int) -> None:
        """Look at a handler that begins, or at code of the user that is about to run at CPL 0."""
        vcpu = self._vcpu
        if rip < KERNEL_HALF:
            self.finish("privilege", f"Code of the user, at {rip:#x}, is about to run at CPL 0.")
            return
        name = self._handlers[rip]
        gs_base = vcpu.msr(_GS_BASE)
        rsp = int(vcpu.regs[Reg.RSP])
        if gs_base < KERNEL_HALF:
            self.finish("privilege", f"{name}() runs with the user's GS base, {gs_base:#x}.")
        elif rsp < KERNEL_HALF:
            self.finish("privilege", f"{name}() runs on the user's stack, at {rsp:#x}.")

    def _announce_all(self) -> None:
        self.way.announced()
        self._vcpu.memory.code_changed(0, len(self._vcpu.memory.ram))

    # vmm_interface.TrapListener

    def on_ve(self, rip: int, info: VeInfo, *, double_fault: bool) -> None:
        """Look at a #VE that is about to be delivered."""
        del rip, info
        if double_fault:
            self.finish("double-fault", "A #VE before the one before it was collected is a #DF.")
        else:
            self.note_delivery(_VECTOR_VE)

    def on_tdcall(self, rip: int, leaf: int, status: int) -> None:
        """Announce writes to guest memory by the module: any page may have changed."""
        del rip, status
        self.way.tdcall(leaf)
        if leaf in _WRITING_TDCALLS:
            self._announce_all()

    def on_tdvmcall(self, rip: int, registers: list[int]) -> None:
        """Announce writes to guest memory by the host."""
        del rip
        if registers[Reg.R11] in _WRITING_TDVMCALLS:
            self._announce_all()
