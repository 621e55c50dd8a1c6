"""The TDX module of one TD with one VCPU: everything between the engine's exits and the VMM.

Build it, give `on_exit` to `Vcpu.run`, and map memory through `sept`. Which exit goes where
is one dictionary look-up; what each handler does was resolved from the rule tables when the
module was built.
"""

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from trapline.cpu.engine import Exit
from trapline.rules.tables import load
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
    from trapline.rules.tables import RuleSet
    from trapline.tdx.sept import Sept

# Exceptions that push an error code (SDM 3A, table 6-1).
WITH_ERROR_CODE: Final = frozenset((8, 10, 11, 12, 13, 14, 17, 21))
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
        self._controls = Controls(config, vcpu.memory.shared_bit.bit_length())
        self.sept = sept
        self.measurements = Measurements(config)
        self._access = PageAccess(vcpu, self._ve, vmm, self.sept, self._controls)
        self._cpuid = Cpuid(vcpu, self._ve, rules, config)
        self._msrs = Msrs(vcpu, self._ve, rules, config, apic)
        instructions = Instructions(vcpu, self._ve, rules, config)
        pages = PageCalls(vcpu, vmm, rules, self.sept, self._access)
        calls = Tdcalls(
            vcpu,
            self._ve,
            vmm,
            rules,
            config,
            controls=self._controls,
            cpuid=self._cpuid,
            access=self._access,
            pages=pages,
            measurements=self.measurements,
        )
        self._fatal_vcpu = rules.status("TDX_NON_RECOVERABLE_VCPU")
        self._fatal_td = rules.status("TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE")
        self._handlers: dict[Exit, Callable[[], None]] = {
            **instructions.handlers,
            Exit.TDCALL: calls.on_tdcall,
            Exit.CPUID: self._cpuid.on_cpuid,
            Exit.RDMSR: self._msrs.on_read,
            Exit.WRMSR: self._msrs.on_write,
            Exit.CR_WRITE: ControlRegisters(vcpu, self._ve, config).on_write,
            Exit.EPT_VIOLATION: self._access.on_ept_violation,
            Exit.EXCEPTION: self._on_exception,
            Exit.TRIPLE_FAULT: self._on_triple_fault,
            Exit.INTERRUPT_WINDOW: vmm.interrupt_window,
            Exit.NMI_WINDOW: self._ve.on_nmi_window,
            Exit.BOUNDARY: vmm.boundary,
            Exit.BREAKPOINT: vmm.breakpoint,
        }

    # What the guest has not collected.

    @property
    def ve_info(self) -> VeInfo | None:
        """VE_INFO while it is valid."""
        return self._ve.info

    @property
    def nmi_pending(self) -> bool:
        """Whether an NMI waits for VEINFO.GET, or for NMIs to be unblocked."""
        return self._ve.nmi_pending

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
        if self._ve.nmi_pending:
            self._ve.arm_nmi_window()

    def _on_exception(self) -> None:
        if self._vmm.intercepted_exception():
            return
        fault = self.vcpu.fault
        if fault.vector == VECTOR_MC:
            information = INTERRUPTION_VALID | INTERRUPTION_HARDWARE_EXCEPTION | fault.vector
            self._vmm.td_exit(
                TdExit(
                    self._fatal_td,
                    ExitReason.EXCEPTION_OR_NMI,
                    interruption_info=information,
                )
            )
            return
        error_code = fault.error_code if fault.vector in WITH_ERROR_CODE else None
        self.vcpu.deliver(fault.vector, error_code)

    def _on_triple_fault(self) -> None:
        self._vmm.td_exit(TdExit(self._fatal_vcpu, ExitReason.TRIPLE_FAULT))

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
