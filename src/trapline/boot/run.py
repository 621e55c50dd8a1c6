"""One boot from beginning to end: a plan becomes a machine, its run a result document.

`BootRun` ties the machine to what looks at it: symbols, milestones, the trace file, gdb, and
the splat of a guest that dies.
"""

from collections import Counter
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Literal, Self

from trapline.base.version import GENERATOR
from trapline.boot.accounting import SiteIndex, account, soundness
from trapline.boot.enforcement import BootGuard
from trapline.boot.kernellog import KernelLog
from trapline.boot.milestones import Milestones
from trapline.boot.trace import describe
from trapline.linux.names import GATES_SET_UP, MILESTONES
from trapline.linux.percpu import preempt_count
from trapline.machine.gdb.debugview import TdTarget
from trapline.machine.machine import Machine, MachineConfig
from trapline.machine.observe.backtrace import task_traces
from trapline.machine.observe.lastwords import take_splat
from trapline.machine.observe.symbols import GuestSymbols
from trapline.machine.outcome import OutcomeKind
from trapline.machine.vmm.ghci import call_name
from trapline.results.boot import (
    CONTEXTS,
    BootKernel,
    BootMachine,
    BootOutcome,
    BootResult,
    Hashes,
    Refusals,
)
from trapline.tdx.vmm_interface import trap_class

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trapline.boot.plan import BootPlan
    from trapline.boot.program import ProgramOutput
    from trapline.cpu.engine import ExitHandler
    from trapline.kernel.binary import Binary
    from trapline.machine.devices.console import Echo
    from trapline.machine.gdb.server import GdbServer
    from trapline.machine.observe.lastwords import Blame
    from trapline.machine.observe.recorder import Sink, TrapPlace, TrapRecord, TrapRecorder
    from trapline.machine.outcome import RunOutcome
    from trapline.results.boot import TrapContext
    from trapline.results.scan import ScanResult
    from trapline.results.splat import Splat, Task

KERNEL_HALF: Final = 1 << 63
SPLAT_TRAPS: Final = 8
# Where gdb gets the guest: before its first instruction, or where symbols have their places.
GdbAt = Literal["start", "kernel"]
# Of a guest that ends so the question is what it waits for.
UNENDED: Final = frozenset({OutcomeKind.HANG, OutcomeKind.TIMEOUT})


class BootRun:
    """One run of one plan; use as a context manager, which frees the guest's memory.

    `vmlinux` is the source of symbols and stays the caller's. `reproduce` is the command line
    that does the same again. `echo` gets console output, `sink` each trap, `program` what the
    plan's program says. `scan` is of the same kernel; policies other than "trap" need it before the
    run.
    """

    def __init__(
        self,
        plan: "BootPlan",
        vmlinux: "Binary | None",
        *,
        reproduce: str,
        echo: "Echo | None" = None,
        sink: "Sink | None" = None,
        scan: "ScanResult | None" = None,
        program: "ProgramOutput | None" = None,
    ) -> None:
        self._program = program
        self._plan = plan
        self._vmlinux = vmlinux
        self._reproduce = reproduce
        self._splat: Splat | None = None
        self._tasks: list[Task] = []
        self._last_line = b""
        self._gdb: GdbServer | None = None
        self._stop_at_kernel = False
        options = plan.options
        self.machine = Machine(
            MachineConfig(
                image=plan.image,
                command_line=plan.command_line,
                initrd=plan.initrd,
                memory=options.memory,
                unaccepted=options.unaccepted,
                board=options.board,
                devices=options.devices,
                module_version=options.module_version,
                seed=options.seed,
                seconds=options.timeout,
                virtual_seconds=options.virtual_seconds,
                console_limit=options.console_limit,
                keyboard=options.keyboard,
                serial_ports=() if program is None else program.ports,
                echo=echo,
                on_line=self._on_line,
                trap_sink=sink,
                on_place=self._on_place,
            ),
            on_dying=self._on_dying,
        )
        self.milestones = Milestones(self._seconds)
        self.symbols = GuestSymbols(
            self.machine.vcpu, vmlinux, release=plan.files.release, modules=plan.modules
        )
        image = plan.image
        if image.kind == "vmlinux":
            self.symbols.place_kernel(0, 0)
            self.milestones.note("kernel entered", "loader")
        else:
            self.symbols.place_decompressor(image.start, image.end - image.start)
            self.milestones.note("decompressor entered", "loader")
        self.guard = BootGuard(
            options.guard, self.machine, self.symbols, SiteIndex(scan), self._take_splat
        )
        self._kernel_seen = False
        self._user_seen = False
        self.log = KernelLog(self.machine, self.symbols, self._complained)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.symbols.close()
        self.machine.close()

    def run(self, gdb: "GdbServer | None" = None, at: GdbAt = "start") -> "RunOutcome":
        """Run the guest to its end, under a debugger if one is given, from `at` on."""
        if gdb is None:
            return self.machine.run()
        if at != "kernel":
            self._gdb = gdb

        def drive(handler: "ExitHandler") -> None:
            if at == "kernel":
                gdb.say("gdb can attach once the kernel runs")
                self._to_kernel(handler)
                self._gdb = gdb
                if self.machine.ended():
                    return
            gdb.run(handler, self.machine.ended)
            if gdb.was_killed:
                self.machine.host.end(OutcomeKind.INTERRUPTED, "The debugger killed the guest.")

        with self.machine.module.listening(gdb):
            outcome = self.machine.run(drive, lambda: gdb.halted)
        gdb.finish(clean=outcome.is_clean, text=outcome.detail)
        return outcome

    def _to_kernel(self, handler: "ExitHandler") -> None:
        """Run to start_kernel(), or the first trap of the kernel: KASLR has chosen by then."""
        self._stop_at_kernel = True
        self.machine.vcpu.run(handler)
        self._stop_at_kernel = False
        # The debugger has the breakpoints from now on.
        self.machine.watch({})
        self.machine.hears_printk = False
        self.machine.host.end_never()

    def debug_target(self) -> TdTarget:
        """Return what gdb may ask for."""
        vcpu, files = self.machine.vcpu, self._plan.files
        return TdTarget(vcpu, self.symbols, self.recent_traps, files.vmlinux)

    def recent_traps(self, count: int) -> "Sequence[str]":
        """Return a line for each of the last `count` traps, oldest first."""
        recent = list(self.machine.recorder.last)
        return [self._line(trap) for trap in recent[max(0, len(recent) - count) :]]

    # The result.

    def result(self, outcome: "RunOutcome", scan: "ScanResult | None") -> BootResult:
        """Describe the run, and free the guest's memory; `scan` is of the same kernel.

        Symbols with their inline chains take as much memory as the guest: they come after it.
        """
        machine, recorder = self.machine, self.machine.recorder
        self.symbols.settle()
        if machine.devices is not None:
            machine.devices.inspect()
        ram = machine.ram_digest()
        devices = self.guard.devices(self.symbols.pci_devices())
        machine.close()
        index = SiteIndex(scan)
        sites = account(recorder.sites.items(), self.symbols, index)
        traps: dict[str, int] = {}
        for reason, count in recorder.ve.items():
            name = trap_class(reason)
            traps[name] = traps.get(name, 0) + count
        return BootResult(
            generator=GENERATOR,
            kernel=self._kernel(),
            machine=self._machine(),
            outcome=BootOutcome(
                kind=outcome.kind.value,
                detail=outcome.detail,
                exit_code=int(outcome.kind.exit_code),
                seconds=outcome.cycles / machine.frequency,
                place=self.symbols.locate(outcome.rip).label,
            ),
            milestones=self.milestones.reached,
            traps=_by_count(traps),
            tdcalls=_by_count(self._tdcalls()),
            tdvmcalls=_by_count(
                {call_name(leaf): count for leaf, count in recorder.tdvmcalls.items()}
            ),
            sites=sites,
            sites_dropped=recorder.sites_dropped,
            soundness=soundness(sites, scanned=index.scanned),
            unaccounted=tuple(site for site in sites if site.standing == "unaccounted"),
            refused=Refusals(
                ports=_hex(machine.ports.unclaimed),
                mmio=_hex(machine.mmio.unclaimed),
                msrs=_hex(machine.host.services.msrs.refused),
                dma=()
                if machine.devices is None
                else tuple(f"{gpa:#x}" for gpa in machine.devices.refused_pages),
            ),
            console_bytes=machine.console.written,
            hashes=Hashes(trace=recorder.digest, console=machine.console.digest, ram=ram),
            splat=self._splat,
            tasks=tuple(self._tasks),
            last_line=self._last_line.decode("utf-8", "replace"),
            program=None if self._program is None else self._program.result,
            complaints=self.log.complaints.result(self._plan.options.fail_on),
            devices=devices,
            policy=self.guard.policy,
            screams=self.guard.screams,
            screams_dropped=self.guard.screams_dropped,
            in_nmi=recorder.in_nmi,
            nested=recorder.nested,
            contexts=_by_context(recorder),
            repeatable=machine.devices is None and self._plan.options.keyboard is None,
        )

    def _kernel(self) -> BootKernel:
        plan, slide = self._plan, self.symbols.slide
        return BootKernel(
            release=plan.files.release,
            build_id=plan.image.build_id,
            image=plan.image.kind,
            file=plan.image.name,
            slide=None if slide is None else f"{slide:#x}",
        )

    def _machine(self) -> BootMachine:
        plan, options = self._plan, self._plan.options
        return BootMachine(
            module_version=options.module_version,
            memory=options.memory,
            unaccepted=options.unaccepted,
            command_line=plan.command_line,
            initrd=plan.initrd_name,
            devices=tuple(region.name for region in self.machine.ports.regions)
            + tuple(region.name for region in self.machine.mmio.regions),
        )

    def _tdcalls(self) -> dict[str, int]:
        names = {row.leaf: row.name for row in self.machine.module.rules.tdcalls}
        return {
            names.get(leaf, f"{leaf:#x}"): count
            for leaf, count in self.machine.recorder.tdcalls.items()
        }

    # What happens during the run.

    def _seconds(self) -> float:
        return self.machine.vcpu.cycles / self.machine.frequency

    def _on_line(self, line: bytes) -> None:
        self._last_line = line or self._last_line
        self.milestones.console_line(line)
        self.log.line(line)

    def _on_place(self, place: "TrapPlace") -> None:
        """Look at each place that traps for the first time."""
        if place.rip >= KERNEL_HALF:
            if not self._kernel_seen:
                self._kernel_seen = True
                self.milestones.note("first trap of the kernel proper", "trap")
                self._watch_functions()
                if self.guard.enforcer is not None:
                    self.guard.enforcer.forget()
            # Modules are looked up while they are there: init code is freed, and some are
            # unloaded again. What is known already is left for later.
            if not self.symbols.runtime.is_text(place.rip):
                self.symbols.locate(place.rip)
        elif place.is_user and not self._user_seen:
            self._user_seen = True
            self._has_gates()
            self.milestones.note("first trap in ring 3", "trap")

    def _watch_functions(self) -> None:
        self.symbols.refresh()
        slide, vmlinux = self.symbols.slide, self._vmlinux
        if slide is None or vmlinux is None or self._gdb is not None:
            return  # a debugger's breakpoints would be lost
        self.machine.recorder.contexts.preempt_count = preempt_count(vmlinux, slide)
        self.machine.watch(
            {
                address + slide: self._reached(symbol, name)
                for symbol, name in MILESTONES.items()
                if (address := vmlinux.address_of(symbol)) is not None
            }
            | {
                address + slide: self._has_gates
                for address in (vmlinux.address_of(GATES_SET_UP),)
                if address is not None
            },
            self.log.breakpoints(vmlinux, slide),
        )

    def _reached(self, symbol: str, name: str) -> "Callable[[], None]":
        def reached() -> None:
            self.milestones.note(name, f"breakpoint at {symbol}")
            if self._stop_at_kernel:
                self.machine.vcpu.stop()

        return reached

    def _has_gates(self) -> None:
        self.machine.recorder.contexts.is_early = False

    def _complained(self, text: str, blame: "Blame") -> "Splat":
        return self._take_splat(f"trapline: {text} ({self._when})", blame)

    def _on_dying(self, machine: Machine) -> None:
        outcome = machine.host.outcome
        if outcome is not None and outcome.kind in UNENDED:
            self._tasks = task_traces(machine.vcpu, self.symbols.runtime, self.symbols.tasks())
        is_said = machine.panic is not None and machine.host.outcome is None
        self._splat = self._take_splat(self._banner(), "exception" if is_said else None)

    def _take_splat(self, banner: str, blame: "Blame | None" = None) -> "Splat":
        self.symbols.refresh()
        return take_splat(
            self.machine.vcpu,
            self.symbols.runtime,
            banner=banner,
            injected=(),
            traps=self.recent_traps(SPLAT_TRAPS),
            reproduce=self._reproduce,
            blame=blame,
        )

    @property
    def _when(self) -> str:
        release = self._plan.files.release or "unknown release"
        return f"{release}, {self._seconds():.6f} s"

    def _banner(self) -> str:
        machine = self.machine
        if machine.host.outcome is not None:
            what = machine.host.outcome.detail
        elif machine.panic is not None:
            what = f"Kernel panic: {machine.panic}."
        else:
            what = machine.double_fault_cause
        return f"trapline: {what} ({self._when})"

    def _line(self, trap: "TrapRecord") -> str:
        fields = describe(trap)
        kind = str(fields.pop("kind"))
        label = self.symbols.locate(trap.rip).label
        seconds = trap.cycles / self.machine.frequency
        del fields["cycles"], fields["rip"]
        rest = " ".join(
            f"{name}={value}" for name, value in fields.items() if value not in (0, "0x0")
        )
        return f"[{seconds:12.6f}] {kind:<8} {label} {rest}"


def _by_context(recorder: "TrapRecorder") -> dict[str, dict[str, int]]:
    """Add up the contexts of #VEs by class."""
    found: dict[str, Counter[TrapContext]] = {}
    for reason, counts in sorted(recorder.contexts.counts().items()):
        found.setdefault(trap_class(reason), Counter()).update(counts)
    return {
        name: {context: counts[context] for context in CONTEXTS if counts[context]}
        for name, counts in found.items()
    }


def _by_count(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _hex(counts: dict[int, int]) -> dict[str, int]:
    return {f"{address:#x}": count for address, count in sorted(counts.items())}


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def trace_header(plan: "BootPlan") -> dict[str, object]:
    """Return all that determines a run, for the first line of its trace.

    QEMU's devices are named, but what they do and their images are not determined.
    """
    options = plan.options
    guard = options.guard
    return {
        "kernel": plan.files.release or "",
        "build_id": plan.image.build_id or "",
        "image": plan.image.kind,
        "command_line": plan.command_line,
        "initrd": plan.initrd_name,
        "initrd_hash": _digest(plan.initrd),
        "insmod": options.insmod,
        "memory": options.memory,
        "unaccepted": options.unaccepted,
        "devices": (*options.board.extras, *map(str, options.devices)),
        "policy": guard.classes,
        "on_forbidden": "panic" if guard.panic else "report",
        "allow": None if guard.allow is None else guard.allow.title,
        "allow_hash": None if guard.allow is None else _digest(repr(guard.allow.entries).encode()),
        "allow_mode": "hide" if guard.hide else "report",
        "module_version": options.module_version,
        "virtual_seconds": options.virtual_seconds,
        "console_limit": options.console_limit,
        "seed": options.seed,
        "generator": GENERATOR,
    }
