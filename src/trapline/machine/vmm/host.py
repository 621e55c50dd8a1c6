"""The host's part in a run: TD exits, interrupts, virtual time, and when to stop.

Time is the engine's virtual TSC. Executed code advances it, each TDVMCALL costs
`TDVMCALL_CYCLES`, and HLT jumps to the next timer event. Nothing else may, so that the same
guest takes the same path each time; the wall clock only ends runs.
"""

import time
from dataclasses import dataclass
from threading import Timer
from typing import TYPE_CHECKING, Final, Protocol

from trapline.cpu.engine import Reg, Vcpu
from trapline.machine.devices.bus import Bus
from trapline.machine.devices.lapic import LocalApic
from trapline.machine.outcome import OutcomeKind, RunOutcome
from trapline.machine.vmm.fatal import FatalError
from trapline.machine.vmm.ghci import PAGE
from trapline.machine.vmm.services import Services
from trapline.rules.ruleset import RuleSet
from trapline.tdx.sept import LEVEL_4K, Sept, SeptState
from trapline.tdx.vmm_interface import ExitReason, ExtendedQualification, TdExit

if TYPE_CHECKING:
    from collections.abc import Callable

# A round trip through the TDX module and KVM takes some 2 us of a real TD's time.
TDVMCALL_CYCLES: Final = 4_000
# How long native code may run before the limits are looked at, in cycles.
SLICE: Final = 50_000_000
# The same with devices that may interrupt at any time.
OUTSIDE_SLICE: Final = 1_000_000
# The wall clock is read once in so many TDVMCALLs.
CLOCK_INTERVAL: Final = 256
# No block of native code takes longer.
BLOCK_CYCLES: Final = 1_024
# How many timer events without an interrupt one HLT sleeps through.
MAX_SILENT_TICKS: Final = 64

VECTOR_DOUBLE_FAULT: Final = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """When to give up: `cycles` of virtual time, `seconds` of the wall clock."""

    cycles: int
    seconds: float | None


class Witness(Protocol):
    """Who is told of what the host itself has no interest in."""

    def breakpoint(self) -> None:
        """Serve a breakpoint."""

    def double_fault(self, *, made_by_module: bool = True) -> None:
        """Note that the guest is about to take #DF."""


class OutsideDevices(Protocol):
    """Devices that live by the wall clock, and interrupt when they please."""

    def poll(self) -> None:
        """Take in what has happened."""

    def wait(self, cycles: int | None) -> int:
        """Let the guest idle for at most `cycles` (None: no limit); returns what passed.

        Ends early when something happened.
        """


class Host:
    """The VMM that the TDX module calls (`vmm_interface.Vmm`), and the events of its services.

    `outcome` is set when the run is over. `outside` are devices that make time real: HLT waits
    for them.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        sept: Sept,
        apic: LocalApic,
        ports: Bus,
        mmio: Bus,
        limits: Limits,
        witness: Witness,
        rules: RuleSet,
    ) -> None:
        self.outcome: RunOutcome | None = None
        self.outside: OutsideDevices | None = None
        self._vcpu = vcpu
        self._apic = apic
        self._limits = limits
        self._witness = witness
        self._sept = sept
        self._paused: Callable[[], float] = float
        self._wall_end: float | None = None
        self._alarm: Timer | None = None
        self._countdown = CLOCK_INTERVAL
        self._window_wanted = False
        self._armed: int | None = None
        self._deadline: tuple[int, Callable[[], None]] | None = None
        self.services = Services(
            ports=ports,
            mmio=mmio,
            apic=apic,
            sept=sept,
            memory=vcpu.memory,
            events=self,
            rules=rules,
        )

    def start(self, paused: "Callable[[], float]" = float) -> None:
        """Begin the run: from here on the wall clock counts.

        `paused` says for how many seconds of it a debugger has held the guest.
        """
        self._paused = paused
        seconds = self._limits.seconds
        if seconds is not None:
            self._wall_end = time.monotonic() + seconds
            self._set_alarm(seconds)
        self._arm(None)

    def finish(self) -> None:
        """Stop the clock; the engine may be closed afterwards."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm.join()
            self._alarm = None

    def end(self, kind: OutcomeKind, detail: str) -> None:
        """End the run; the first reason stands."""
        if self.outcome is None:
            vcpu = self._vcpu
            self.outcome = RunOutcome(kind, detail, vcpu.regs[Reg.RIP], vcpu.cycles)
        self._vcpu.stop()

    def end_at(self, cycles: int, end: "Callable[[], None]") -> None:
        """Have `end` called, which ends the run, once so much virtual time has passed."""
        self._deadline = cycles, end

    def end_never(self) -> None:
        """Take back what `end_at` did."""
        self._deadline = None

    # TD exits (vmm_interface.Vmm).

    def tdvmcall(self, registers: list[int]) -> None:
        """Serve a TDG.VP.VMCALL."""
        self._vcpu.cycles += TDVMCALL_CYCLES
        self.services.call(registers)
        if self.outside is not None:
            self.outside.poll()
        self.settle()
        self._countdown -= 1
        if self._countdown == 0:
            self._countdown = CLOCK_INTERVAL
            self._check_limits()

    def interrupt_window(self) -> None:
        """Deliver the interrupt that waits."""
        vector = self._apic.accept()
        if vector is not None:
            self._vcpu.deliver_interrupt(vector)
        self.settle()

    def boundary(self) -> None:
        """Fire timers and look at the limits."""
        due = self._apic.due
        if due is not None and 0 < due - self._vcpu.cycles <= BLOCK_CYCLES:
            # Native code stops in front of the block in which the timer would fire.
            self._vcpu.cycles = due
        if self.outside is not None:
            self.outside.poll()
        self._check_limits()
        self.settle()
        self._arm(self._apic.due)

    def ept_violation(self, td_exit: TdExit) -> None:
        """Add the page that the guest wants to accept; all else ends the run."""
        gpa = td_exit.gpa
        if td_exit.extended_type == ExtendedQualification.ACCEPT and self._aug(gpa):
            return
        half = "shared" if gpa & self._vcpu.memory.shared_bit else "private"
        what = (
            "accessed before it was accepted"
            if td_exit.extended_type == ExtendedQualification.PENDING_EPT_VIOLATION
            else "not mapped"
        )
        because = f"; {td_exit.because}" if td_exit.because else ""
        self.end(
            OutcomeKind.EPT_VIOLATION, f"EPT violation on {half} GPA {gpa:#x}: {what}{because}."
        )

    def _aug(self, gpa: int) -> bool:
        """TDH.MEM.PAGE.AUG of 4 KiB, whatever was asked for (KVM, tdx_gmem_max_mapping_level)."""
        sept = self._sept
        if gpa >= sept.memory_size or sept.private_state(gpa) != SeptState.FREE:
            return False
        sept.aug(gpa & -PAGE, PAGE, LEVEL_4K)
        return True

    def td_exit(self, td_exit: TdExit) -> None:
        """End the run: nothing that comes here can be served."""
        if td_exit.reason == ExitReason.TRIPLE_FAULT:
            self.end(OutcomeKind.TRIPLE_FAULT, "Triple fault: the VCPU cannot be entered again.")
        else:
            self.end(
                OutcomeKind.TD_DEAD,
                f"TD exit {td_exit.reason.name} with status {td_exit.status:#x}: "
                "the TD cannot be entered again.",
            )

    def breakpoint(self) -> None:
        """Pass it on to who set it."""
        self._witness.breakpoint()

    def intercepted_exception(self) -> bool:
        """Note a #DF, and let the guest have its exception."""
        if self._vcpu.fault.vector == VECTOR_DOUBLE_FAULT:
            self._witness.double_fault(made_by_module=False)
        return False

    # Events of the services.

    def halt(self, *, interrupts_blocked: bool) -> None:
        """Let time pass until an interrupt is pending.

        With interrupts blocked KVM waits for an NMI, and none comes of itself
        (`tdx_interrupt_allowed()` looks at R12).
        """
        if interrupts_blocked:
            self.end(
                OutcomeKind.HANG, "HLT with interrupts blocked: only an NMI could wake the guest."
            )
            return
        apic = self._apic
        apic.tick()
        if self.outside is not None:
            self._wait(self.outside)
            return
        # A timer whose interrupt is masked wakes nobody; a hostile guest can have it fire for
        # ever. The guest must expect to wake for no reason, so it does after a few turns.
        for _ in range(MAX_SILENT_TICKS):
            if apic.pending() is not None:
                return
            if apic.due is None:
                self.end(OutcomeKind.HANG, "HLT with no timer armed: nothing can wake the guest.")
                return
            self._vcpu.cycles = max(self._vcpu.cycles, min(apic.due, self._limits.cycles))
            if self._vcpu.cycles >= self._limits.cycles:
                self._check_limits()
                return
            apic.tick()

    def _wait(self, outside: OutsideDevices) -> None:
        """Let real time pass until an interrupt is pending."""
        apic, vcpu = self._apic, self._vcpu
        while apic.pending() is None and self.outcome is None:
            left = None if apic.due is None else max(0, apic.due - vcpu.cycles)
            vcpu.cycles += outside.wait(left)
            apic.tick()
            self._check_limits()

    def fatal_error(self, error: FatalError) -> None:
        """End the run with the guest's own words."""
        text = f'"{error.message}"' if error.message else "no message"
        self.end(OutcomeKind.FATAL_ERROR, f"The guest reports a fatal error: {text}.")

    # Interrupts and time.

    def settle(self) -> None:
        """Fire what is due, and ask the engine for an interrupt window if one is needed."""
        apic = self._apic
        due = apic.due
        if due is not None and self._vcpu.cycles >= due:
            apic.tick()
            due = apic.due
        wanted = apic.pending() is not None
        if wanted != self._window_wanted:
            self._window_wanted = wanted
            self._vcpu.request_interrupt_window(wanted)
        if due != self._armed:
            self._arm(due)

    def _arm(self, due: int | None) -> None:
        """Have native code stop at the next timer event, or when a slice is over."""
        self._armed = due
        longest = SLICE if self.outside is None else OUTSIDE_SLICE
        left = longest if due is None else max(1, due - self._vcpu.cycles)
        self._vcpu.set_time_budget(min(left, longest))

    def _set_alarm(self, seconds: float) -> None:
        """Have another thread ask for a boundary.

        A guest can keep the engine busy with exits that neither come here nor use up virtual
        time (#UD, PAUSE, most TDCALL leaves), so the limits would never be looked at.
        """
        self._alarm = Timer(seconds, self._vcpu.request_boundary)
        self._alarm.daemon = True
        self._alarm.start()

    def _seconds_left(self) -> float | None:
        """Return what is left of the wall clock, not counting a debugger's pauses."""
        if self._wall_end is None:
            return None
        return self._wall_end + self._paused() - time.monotonic()

    def _check_limits(self) -> None:
        deadline = self._deadline
        if deadline is not None and self._vcpu.cycles >= deadline[0]:
            self._deadline = None
            deadline[1]()
        left = self._seconds_left()
        if self._vcpu.cycles >= self._limits.cycles:
            self.end(OutcomeKind.HANG, "The guest used up its virtual time without powering off.")
        elif left is not None and left <= 0:
            self.end(OutcomeKind.TIMEOUT, "The time limit of --timeout passed.")
        elif left is not None and self._alarm is not None and not self._alarm.is_alive():
            self._set_alarm(left)  # it rang while a debugger had the guest
