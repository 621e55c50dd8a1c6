"""A TD put together: engine, TDX module, VMM, devices and guest memory.

    machine = Machine(config)
    outcome = machine.run()

Without QEMU's devices everything in it is deterministic: the same configuration gives the same
traps, console output and memory, and the wall clock only ends runs (`MachineConfig.seconds`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from trapline.cpu.default import open_engine
from trapline.cpu.engine import ExitHandler, Factory, Memory, Reg, Vcpu
from trapline.kernel.live.printk import read_string
from trapline.linux import messages
from trapline.machine.devices import hpet, ioapic, pit, power, rtc, uart
from trapline.machine.devices.bus import Bus
from trapline.machine.devices.console import DEFAULT_LIMIT, Console, Echo
from trapline.machine.devices.interface import IrqLine, no_irq
from trapline.machine.devices.lapic import LocalApic
from trapline.machine.keyboard import Keyboard
from trapline.machine.loader import gpamap, place
from trapline.machine.loader.acpi import Board
from trapline.machine.loader.kernelimage import KernelImage
from trapline.machine.observe.recorder import Sink, TrapPlace, TrapRecorder
from trapline.machine.outcome import OutcomeKind, RunOutcome
from trapline.machine.qemu.board import QemuBoard
from trapline.machine.qemu.catalogue import DeviceRequest
from trapline.machine.qemu.qtest import QemuDiedError
from trapline.machine.vmm.host import VECTOR_DOUBLE_FAULT, Host, Limits
from trapline.rules.ruleset import RuleSet
from trapline.rules.tables import load
from trapline.tdx.module import TdxModule
from trapline.tdx.sept import Sept
from trapline.tdx.vmm_interface import TdConfig

PORT_SPACE: Final = 1 << 16
DEFAULT_VIRTUAL_SECONDS: Final = 300
# Linux needs some 50 ms from a double fault to the panic that it leads to, and 1 s at most where
# that waits for other CPUs or a console (nmi_shootdown_cpus(), console_flush_on_panic()).
LAST_WORD_SECONDS: Final = 1.0
_FRAME: Final = 48  # bytes that the processor pushes for an exception with an error code
# A handler of double faults that takes one itself starts again, on the stack of before, for ever.
MAX_FALLS: Final = 16
# Ends that may only follow from what the guest died of.
CONSEQUENCES: Final = frozenset(
    {
        OutcomeKind.POWERED_OFF,
        OutcomeKind.RESET,
        OutcomeKind.HANG,
        OutcomeKind.TIMEOUT,
        OutcomeKind.PANIC,
        OutcomeKind.TRIPLE_FAULT,
    }
)


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """What TD to build.

    `memory` and `unaccepted` are bytes, `seconds` limits the wall clock, `virtual_seconds` the
    guest's own. `devices` are modelled by QEMU and need `board.pci`. What comes from the descriptor
    `keyboard` is typed at the first serial port. `serial_ports` get each byte
    sent through the second serial port and those behind it, `board.further_ports` of them. `echo`
    gets the console's output line by line, `on_line` the same without line ends; `trap_sink` gets
    each trap, `on_place` each place at its first trap.
    """

    image: KernelImage
    command_line: str
    initrd: bytes
    memory: int = gpamap.DEFAULT_MEMORY
    unaccepted: int = 0
    board: Board = field(default_factory=Board)
    devices: tuple[DeviceRequest, ...] = ()
    module_version: str = "1.5.01"
    seed: int = 1
    epoch: int = rtc.DEFAULT_EPOCH
    seconds: float | None = None
    virtual_seconds: int = DEFAULT_VIRTUAL_SECONDS
    console_limit: int = DEFAULT_LIMIT
    keyboard: int | None = None
    serial_ports: tuple[Callable[[int], None], ...] = ()
    echo: Echo | None = None
    on_line: Callable[[bytes], None] | None = None
    trap_sink: Sink | None = None
    on_place: Callable[[TrapPlace], None] | None = None


class _ApicPage:
    """The virtual APIC page: after each write, interrupts may have become deliverable."""

    def __init__(self, apic: LocalApic, settle: Callable[[], None]) -> None:
        self._apic = apic
        self._settle = settle

    def read(self, index: int) -> int:
        return self._apic.read(index)

    def write(self, index: int, value: int) -> bool:
        done = self._apic.write(index, value)
        self._settle()
        return done


class Machine:
    """One TD, ready to run. `memory`, `vcpu`, `module` and `recorder` may be looked at afterwards.

    `factory` opens the CPU engine; `rules` default to those of `config.module_version`. `on_dying`
    is called, once, while the guest's state is still that of its first double fault or of the end
    of a run that was not clean.
    """

    def __init__(
        self,
        config: MachineConfig,
        *,
        factory: Factory = open_engine,
        rules: RuleSet | None = None,
        on_dying: Callable[["Machine"], None] | None = None,
    ) -> None:
        place.check_memory(config.memory)
        self.config = config
        self._on_dying = on_dying
        self._watched: dict[int, Callable[[], None]] = {}
        self._always: dict[int, Callable[[], None]] = {}
        #: Whether `said` is told what the kernel prints: what its console shows is then no word of
        #: the kernel's.
        self.hears_printk = False
        self.panic: str | None = None
        self._restarting = self._halting = False
        self.double_faults = 0
        self.double_fault_cause = "The guest took a double fault."
        self._falls = 0  # double faults on the way down, too
        self.nmis = 0  # sent to the guest through its local APIC
        self.rules = load(config.module_version) if rules is None else rules
        td = TdConfig(
            memory_size=config.memory,
            module_version=config.module_version,
            no_rbp_mod=True,  # as KVM builds its TDs (setup_tdparams)
        )
        self.frequency = td.tsc_frequency
        self.engine = factory(config.memory, seed=config.seed, split_ram=bool(config.devices))
        self.memory: Memory = self.engine.memory
        self.vcpu: Vcpu = self.engine.vcpus[0]
        self.apic = LocalApic(self._now, self.frequency, self._pend_nmi)
        self.console = Console(
            echo=config.echo,
            on_line=self._console_line,
            limit=config.console_limit,
            on_limit=self._console_flood,
        )
        self.mmio = Bus("MMIO", self.memory.shared_bit)
        self.ioapic: ioapic.IoApic | None = None
        serial_irq = self._build_mmio()
        self.ports = self._build_ports(serial_irq)
        self.recorder = TrapRecorder(
            self.vcpu, config.trap_sink, config.on_place, self.double_fault
        )
        limits = Limits(config.virtual_seconds * self.frequency, config.seconds)
        sept = Sept(self.memory, config.memory)
        self.host = Host(
            self.vcpu, sept, self.apic, self.ports, self.mmio, limits, self, self.rules
        )
        self.module = TdxModule(
            self.vcpu,
            self.host,
            td,
            self.rules,
            apic=_ApicPage(self.apic, self.host.settle),
            sept=sept,
            listeners=(self.recorder,),
        )
        self.devices = self._start_devices() if config.devices else None
        if config.keyboard is not None:
            self.host.outside = Keyboard(
                config.keyboard,
                self.serial,
                self.console,
                self.frequency,
                devices=self.devices,
                leave=self._left,
            )
        self.vcpu.intercept_exceptions(frozenset({VECTOR_DOUBLE_FAULT}))
        self.placement = self._load()

    def run(
        self,
        drive: Callable[[ExitHandler], None] | None = None,
        paused: Callable[[], float] = float,
    ) -> RunOutcome:
        """Run until the guest ends, one way or the other.

        `drive` replaces `Vcpu.run`, as a debugger does; it must return once `ended` is true.
        `paused` says for how many seconds the debugger has held the guest.
        """
        self.host.start(paused)
        try:
            (drive or self.vcpu.run)(self.module.on_exit)
        except QemuDiedError as error:
            self._devices_died(error)
        finally:
            self.host.finish()
        self.console.flush()
        outcome = self.host.outcome
        if outcome is None:
            self.host.end(OutcomeKind.INTERRUPTED, "The run was interrupted.")
            outcome = self.host.outcome
            assert outcome is not None
        outcome = self._explain(outcome)
        if not outcome.is_clean:
            self._dying()
        return outcome

    def watch(
        self,
        places: dict[int, Callable[[], None]],
        always: dict[int, Callable[[], None]] | None = None,
    ) -> None:
        """Call each function when its linear address is about to execute for the first time.

        Those of `always` are called each time.
        """
        self._watched = dict(places)
        self._always = dict(always or {})
        self._set_breakpoints()

    def _set_breakpoints(self) -> None:
        self.vcpu.set_breakpoints(frozenset((*self._watched, *self._always)))

    def ended(self) -> bool:
        """Whether the run is over."""
        return self.host.outcome is not None

    def ram_digest(self) -> str:
        """BLAKE2b-128 of guest memory, in hexadecimal."""
        return self.memory.digest()

    def close(self) -> None:
        """End the devices and free guest memory."""
        if self.devices is not None:
            self.devices.close()
        self.engine.close()

    # Building.

    def _now(self) -> int:
        return self.vcpu.cycles

    def _build_mmio(self) -> IrqLine:
        """Add what the board has beyond ports; returns the serial port's interrupt line."""
        board = self.config.board
        if board.hpet:
            timer = hpet.Hpet(self._now, self.frequency)
            self.mmio.add(gpamap.HPET, hpet.SIZE, "HPET", timer, width=8)
        if board.mmio_uart:
            port = uart.Uart16550(self.console.put)
            self.mmio.add(gpamap.MMIO_UART, uart.PORTS, "memory-mapped serial port", port)
        if not board.ioapic:
            return no_irq
        interrupts = self.ioapic = ioapic.IoApic(self.apic.raise_vector)
        self.mmio.add(gpamap.IOAPIC, ioapic.SIZE, "IO-APIC", interrupts, width=4)
        return partial(interrupts.set_line, uart.COM1_IRQ)

    def _build_ports(self, serial_irq: IrqLine) -> Bus:
        ports = Bus("port", PORT_SPACE)
        timer = pit.Pit(self._now, self.frequency)
        control = pit.SystemControlPort(timer)
        clock = rtc.CmosRtc(self._now, self.frequency, self.config.epoch)
        registers = power.AcpiPower(self._powered_off, self._reset)
        serial = self.serial = uart.Uart16550(self.console.put, serial_irq)
        ports.add(uart.COM1, uart.PORTS, "serial port", serial)
        for port, sink in zip(uart.FURTHER, self.config.serial_ports, strict=False):
            ports.add(port, uart.PORTS, "serial port", uart.Uart16550(sink))
        ports.add(rtc.INDEX_PORT, rtc.PORTS, "RTC", clock)
        ports.add(pit.PORT, pit.PORTS, "PIT", timer)
        ports.add(pit.SYSTEM_CONTROL_PORT, 1, "system control port", control)
        ports.add(power.PORT, power.PORTS, "ACPI power registers", registers)
        return ports

    def _start_devices(self) -> QemuBoard:
        board = QemuBoard(
            self.config.devices,
            self.memory.shared_fd,
            self.config.memory,
            apic=self.apic,
            ioapic=self.ioapic,
            frequency=self.frequency,
        )
        board.attach(self.ports, self.mmio, self.module.sept)
        self.host.outside = board
        return board

    def _load(self) -> place.Placement:
        config = self.config
        plan = place.LoadPlan(
            config.image, config.command_line, config.initrd, config.board, config.unaccepted
        )
        placement = place.load(self.vcpu, plan)
        sept = self.module.sept
        # The TD's firmware has accepted this part; the rest is for the guest to accept.
        sept.add(0, placement.unaccepted)
        return placement

    # Events.

    def _pend_nmi(self) -> None:
        self.nmis += 1
        self.module.pend_nmi()

    def _left(self) -> None:
        self.host.end(OutcomeKind.LEFT, "The guest was left running, and ended.")

    def _powered_off(self) -> None:
        self.host.end(OutcomeKind.POWERED_OFF, "The guest powered itself off.")

    def _reset(self) -> None:
        self.host.end(OutcomeKind.RESET, "The guest reset itself.")

    def _devices_died(self, error: QemuDiedError) -> None:
        words = "" if self.devices is None else self.devices.close()
        said = f" Its last words: {words.splitlines()[-1]}" if words else ""
        self.host.end(OutcomeKind.DEVICES_DIED, f"{error}{said}")

    def _console_flood(self) -> None:
        self.host.end(
            OutcomeKind.CONSOLE_FLOOD,
            f"The guest printed more than {self.config.console_limit:,} bytes on its console.",
        )

    def _console_line(self, line: bytes) -> None:
        if self.double_faults:
            self._wait_for_word()
        if self.config.on_line is not None:
            self.config.on_line(line)
        if not self.hears_printk:
            self.said(line)
        if self.panic is not None and messages.PANIC_END.search(line):
            self._panicked()

    def said(self, message: bytes) -> None:
        """Take in what the kernel says, without its level."""
        if self.panic is None:
            found = messages.PANIC.search(message)
            if found is not None:
                self.panic = found[1].decode("utf-8", "replace").rstrip(".\n")
                self.recorder.contexts.is_panic = True
                self._dying()
        elif self.hears_printk and messages.PANIC_END.search(message):
            # Its console is yet to show it, if it has one.
            self.host.end_at(self._now() + self.frequency // 10, self._panicked)
        self._restarting = self._restarting or messages.RESTART.search(message) is not None
        self._halting = self._halting or messages.HALT.search(message) is not None

    def panics(self, message: int) -> None:
        """End the run of a guest that is at the entry of panic(), with its format at a GLA."""
        text = read_string(self.vcpu.read, message) or b"no message"
        self.panic = text.decode("utf-8", "replace").rstrip(".\n")
        if self.double_faults:
            self.host.end(OutcomeKind.DOUBLE_FAULT, self.double_fault_cause)
        else:
            self._panicked()

    def _panicked(self) -> None:
        self.host.end(OutcomeKind.PANIC, f"Kernel panic: {self.panic}.")

    def breakpoint(self) -> None:
        """Call what `watch` was given for this address."""
        rip = self.vcpu.regs[Reg.RIP]
        always = self._always.get(rip)
        if always is not None:
            always()
        reached = self._watched.pop(rip, None)
        if reached is not None:
            self._set_breakpoints()
            reached()

    def double_fault(self, *, made_by_module: bool = True) -> None:
        """Note that the guest is about to take #DF; on the way down it no longer matters."""
        self._falls += 1
        if self.panic is None and not self._restarting:
            if not self.double_faults:
                because = self.module.because if made_by_module else self._no_delivery()
                self.double_fault_cause = f"The guest took a double fault: {because}."
            self.double_faults += 1
            self.recorder.contexts.is_panic = True
            self._dying()
            self._wait_for_word()
        if self._falls >= MAX_FALLS:
            self._is_lost()

    def _no_delivery(self) -> str:
        """Say why the processor could not deliver an exception."""
        stack = self.vcpu.regs[Reg.RSP]
        if stack < _FRAME or self.vcpu.read(stack - _FRAME, _FRAME) is None:
            return f"an exception found no stack, as RSP was {stack:#x} (rule ve-class)"
        return "a fault came while an exception was being delivered (rule ve-class)"

    def _wait_for_word(self) -> None:
        """Let a guest that took #DF go on for as long as it has something to say.

        Linux then panics and says so; one whose entry code is broken may never come to it.
        """
        self.host.end_at(self._now() + int(self.frequency * LAST_WORD_SECONDS), self._is_lost)

    def _is_lost(self) -> None:
        how = "one after the other" if self._falls >= MAX_FALLS else "and said nothing more"
        self.host.end(OutcomeKind.DOUBLE_FAULT, f"The guest took double faults, {how}.")

    def _dying(self) -> None:
        if self._on_dying is not None:
            call, self._on_dying = self._on_dying, None
            call(self)

    def _explain(self, outcome: RunOutcome) -> RunOutcome:
        """Say what the guest died of, where its end only followed from that."""
        if outcome.kind not in CONSEQUENCES:
            return outcome
        if self.double_faults and outcome.kind != OutcomeKind.TRIPLE_FAULT:
            kind, detail = OutcomeKind.DOUBLE_FAULT, self.double_fault_cause
        elif self.panic is not None and outcome.kind != OutcomeKind.POWERED_OFF:
            kind, detail = OutcomeKind.PANIC, f"Kernel panic: {self.panic}."
        elif self._restarting and outcome.kind == OutcomeKind.TRIPLE_FAULT:
            kind, detail = OutcomeKind.RESET, "The guest reset itself, by a triple fault."
        elif self.double_faults and outcome.kind == OutcomeKind.TRIPLE_FAULT:
            kind, detail = outcome.kind, f"{outcome.detail} {self.double_fault_cause}"
        elif self._halting and outcome.kind == OutcomeKind.HANG:
            kind, detail = OutcomeKind.HALTED, "The guest halted itself, which nothing ends."
        else:
            return outcome
        return RunOutcome(kind, detail, outcome.rip, outcome.cycles)
