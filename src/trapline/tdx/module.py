"""The TDX module of one TD with one VCPU: everything between the engine's exits and the VMM.

Build it, give `on_exit` to `Vcpu.run`, and map memory through `sept`. Which exit goes where
is one dictionary look-up; what each handler does was resolved from the rule tables when the
module was built.
"""

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from trapline.cpu.engine import Exit, Reg
from trapline.rules.rows import InstructionRule, Outcome
from trapline.rules.ruleset import choose
from trapline.rules.tables import load
from trapline.tdx.completions import Completions
from trapline.tdx.control_registers import ControlRegisters
from trapline.tdx.controls import Controls, ControlsSnapshot
from trapline.tdx.cpuid import Cpuid
from trapline.tdx.instructions import Instructions
from trapline.tdx.measurement import Measurements, MeasurementSnapshot
from trapline.tdx.msr import Msrs
from trapline.tdx.page_access import PageAccess
from trapline.tdx.page_calls import PageCalls
from trapline.tdx.sept import SeptSnapshot
from trapline.tdx.tdcalls import Tdcalls
from trapline.tdx.ve_info import VECTOR_MC, VeSnapshot, VeState
from trapline.tdx.vmm_interface import (
    ExitReason,
    TdConfig,
    TdExit,
    TrapListener,
    VeInfo,
    VirtualApic,
    Vmm,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from trapline.cpu.engine import Vcpu
    from trapline.rules.rows import Feature
    from trapline.rules.ruleset import RuleSet
    from trapline.tdx.sept import Sept

# Exceptions that push an error code (SDM 3A, table 6-1).
WITH_ERROR_CODE: Final = frozenset((8, 10, 11, 12, 13, 14, 17, 21))
EFER, EFER_LMA, CS_LONG = 0xC000_0080, 1 << 10, 1 << 21
INTERRUPTION_VALID: Final = 1 << 31
INTERRUPTION_HARDWARE_EXCEPTION: Final = 3 << 8


class ModuleState(NamedTuple):
    """What `TdxModule.save` returns, to go with a snapshot of the engine."""

    ve: VeSnapshot
    controls: ControlsSnapshot
    cpuid_ve: tuple[bool, bool, tuple[tuple[int, int], ...]]
    msrs: tuple[tuple[int, int], ...]
    measurements: MeasurementSnapshot
    sept: SeptSnapshot
    stepping: tuple[int, int, tuple[int, ...]]


class TdxModule:
    """One TD on one VCPU, with its host.

    `sept` are the TD's page states, which the host has too. `rules` defaults to the tables of
    `config.module_version`. `listeners` are told of traps, in this order; others, for a while,
    through `listening`.
    """

    def __init__(
        self,
        vcpu: "Vcpu",
        vmm: Vmm,
        config: TdConfig,
        rules: "RuleSet | None" = None,
        *,
        sept: "Sept",
        apic: VirtualApic,
        listeners: "Iterable[TrapListener]" = (),
    ) -> None:
        rules = load(config.module_version) if rules is None else rules
        self.vcpu = vcpu
        self.config = config
        self.rules = rules
        self._vmm = vmm
        self._listeners = list(listeners)
        self._ve = VeState(vcpu, rules, self._listeners)
        self._controls = Controls(rules, config, vcpu.memory.shared_bit.bit_length())
        self.sept = sept
        self.measurements = Measurements(config)
        self._access = PageAccess(vcpu, self._ve, vmm, rules, self.sept, self._controls)
        features = self._controls.features()
        self._cpuid = Cpuid(vcpu, self._ve, rules, config, features)
        self._msrs = Msrs(vcpu, self._ve, rules, config, apic, features)
        self._controls.on_features = self._set_features
        instructions = Instructions(vcpu, self._ve, rules, config)
        completions = Completions(rules)
        calls = Tdcalls(
            vcpu,
            self._ve,
            vmm,
            rules,
            config,
            completions=completions,
            controls=self._controls,
            cpuid=self._cpuid,
            access=self._access,
            pages=PageCalls(vcpu, vmm, completions, self.sept, self._access),
            measurements=self.measurements,
        )
        see = instructions.handler
        self._tdcall = see("TDCALL", "cpl_0_64bit", see_tdcalls=calls.on_tdcall)
        self._tdcall_elsewhere = see("TDCALL", "not_64bit", see_tdcalls=calls.on_tdcall)
        self._resolve_ends(rules)
        self._handlers: dict[Exit, Callable[[], None]] = {
            **instructions.handlers,
            Exit.TDCALL: self._on_tdcall,
            Exit.CPUID: see("CPUID", "always", see_cpuid=self._cpuid.on_cpuid),
            Exit.RDMSR: see("RDMSR", "cpl_0", see_msrs=self._msrs.on_read),
            Exit.WRMSR: see("WRMSR", "cpl_0", see_msrs=self._msrs.on_write),
            Exit.CR_WRITE: ControlRegisters(vcpu, self._ve, rules, config).on_write,
            Exit.EPT_VIOLATION: self._access.on_ept_violation,
            Exit.EXCEPTION: self._on_exception,
            Exit.TRIPLE_FAULT: self._triple_fault,
            Exit.INTERRUPT_WINDOW: vmm.interrupt_window,
            Exit.NMI_WINDOW: self._ve.on_nmi_window,
            Exit.BOUNDARY: vmm.boundary,
            Exit.BREAKPOINT: vmm.breakpoint,
        }

    def _set_features(self, features: "frozenset[Feature]") -> None:
        self._cpuid.set_features(features)
        self._msrs.set_features(features)

    def _resolve_ends(self, rules: "RuleSet") -> None:
        """Look up what exceptions and their failure are to the module."""
        ok = rules.status("TDX_SUCCESS")
        vcpu = rules.status("TDX_NON_RECOVERABLE_VCPU")
        td = rules.status("TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE")
        event = ExitReason.EXCEPTION_OR_NMI

        def does(
            name: str, condition: str, can: "dict[Outcome, Callable[[], None]]"
        ) -> "Callable[[], None]":
            return choose(rules.ask(InstructionRule, name, condition), can)

        self._triple_fault = does(
            "triple fault",
            "always",
            {
                Outcome.TD_FATAL: partial(self._exit, vcpu, ExitReason.TRIPLE_FAULT),
                Outcome.TD_EXIT: partial(self._exit, ok, ExitReason.TRIPLE_FAULT),
            },
        )
        exits: dict[Outcome, Callable[[], None]] = {
            Outcome.NATIVE: self._deliver,
            Outcome.TD_EXIT: partial(self._exit, ok, event),
            Outcome.TD_FATAL: partial(self._exit, td, event),
        }
        self._machine_check = does("machine check", "always", exits)
        self._exception = does("exception", "not_debug", exits)

    # What the guest has not collected.

    @property
    def ve_info(self) -> VeInfo | None:
        """VE_INFO while it is valid."""
        return self._ve.info

    @property
    def because(self) -> str:
        """Why the module raised its last #DF or #GP, with the rule's id."""
        return self._ve.because

    @property
    def nmi_pending(self) -> bool:
        """Whether an NMI waits for VEINFO.GET, or for NMIs to be unblocked."""
        return self._ve.nmis > 0

    @contextmanager
    def listening(self, listener: TrapListener, *, alone: bool = False) -> "Iterator[None]":
        """Tell `listener` of traps, too, while the context lasts; `alone`: nobody else."""
        listeners = self._listeners
        others = listeners[:] if alone else []
        if alone:
            listeners.clear()
        listeners.append(listener)
        try:
            yield
        finally:
            listeners.remove(listener)
            listeners[:0] = others

    def divert(self, call: "Callable[[VeInfo], bool] | None") -> None:
        """Have `call` asked before each #VE; True means that it carried the instruction out."""
        self._ve.divert = call

    # The exit handler.

    def on_exit(self, exit_: Exit) -> None:
        """Serve one exit; this is the handler for `Vcpu.run` and `Vcpu.step`."""
        self._handlers[exit_]()
        if self._ve.nmis:
            self._ve.arm_nmi_window()

    def _on_tdcall(self) -> None:
        # The CPU has checked CPL. Compatibility mode has 32-bit RIPs: above, the two look-ups
        # can be saved.
        if self.vcpu.regs[Reg.RIP] >> 32 or self._in_64bit_mode():
            self._tdcall()
        else:
            self._tdcall_elsewhere()

    def _in_64bit_mode(self) -> bool:
        vcpu = self.vcpu
        return bool(vcpu.msr(EFER) & EFER_LMA and vcpu.segment("cs").attributes & CS_LONG)

    def _on_exception(self) -> None:
        if self._vmm.intercepted_exception():
            return
        if self.vcpu.fault.vector == VECTOR_MC:
            self._machine_check()
        else:
            self._exception()

    def _deliver(self) -> None:
        fault = self.vcpu.fault
        error_code = fault.error_code if fault.vector in WITH_ERROR_CODE else None
        self.vcpu.deliver(fault.vector, error_code)

    def _exit(self, status: int, reason: ExitReason) -> None:
        information = 0
        if reason is ExitReason.EXCEPTION_OR_NMI:
            vector = self.vcpu.fault.vector
            information = INTERRUPTION_VALID | INTERRUPTION_HARDWARE_EXCEPTION | vector
        self._vmm.td_exit(TdExit(status, reason, interruption_info=information))

    # What the VMM, the machine and the explorer may ask for.

    def pend_nmi(self) -> None:
        """Hold an NMI for the guest (PEND_NMI of TDH.VP.WR).

        It is delivered at the first instruction boundary with VE_INFO free and NMIs not
        blocked, so after TDG.VP.VEINFO.GET or IRET at the earliest.
        """
        self._ve.pend_nmi()

    def inject_ve(self, info: VeInfo) -> None:
        """#VE by the module, at this instruction, whatever it is."""
        self._ve.inject(info)

    def notify_ept_fault(self, gpa: int) -> bool:
        """Inject the notification #VE of TDH.VP.ENTER; False when the rules forbid it."""
        return self._access.notify(gpa)

    def save(self) -> ModuleState:
        """Return everything the module remembers of the TD."""
        cpuid = self._cpuid
        return ModuleState(
            ve=self._ve.save(),
            controls=self._controls.save(),
            cpuid_ve=(cpuid.supervisor_ve, cpuid.user_ve, tuple(cpuid.control.items())),
            msrs=tuple(self._msrs.values.items()),
            measurements=self.measurements.save(),
            sept=self.sept.save(),
            stepping=self._access.save(),
        )

    def restore(self, state: ModuleState) -> None:
        """Go back to a saved state; the engine is restored separately, and first."""
        self._ve.restore(state.ve)
        self._controls.restore(state.controls)
        self._cpuid.supervisor_ve, self._cpuid.user_ve, control = state.cpuid_ve
        self._cpuid.control.clear()
        self._cpuid.control.update(control)
        self._msrs.values.clear()
        self._msrs.values.update(state.msrs)
        self.measurements.restore(state.measurements)
        self.sept.restore(state.sept)
        self._access.restore(state.stepping)
