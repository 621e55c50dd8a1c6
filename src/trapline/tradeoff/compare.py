"""Runs the workload under each design and counts."""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trapline.base.version import GENERATOR
from trapline.boot.plan import BootOptions, make_plan, open_symbols, parse_devices
from trapline.boot.policy import Guard
from trapline.boot.run import BootRun
from trapline.kernel.elf.alternatives import Alternatives
from trapline.machine.qemu import process
from trapline.results.tradeoff import Design, DesignName, TradeoffResult
from trapline.rules.tables import DEFAULT_VERSION
from trapline.tradeoff.workload import COMMAND_LINE, MODULES, Workload

if TYPE_CHECKING:
    from trapline.boot.plan import BootPlan
    from trapline.kernel.binary import Binary
    from trapline.kernel.find.kernelfiles import KernelFiles
    from trapline.results.boot import BootResult
    from trapline.results.scan import ScanResult

DESIGNS: Final[tuple[DesignName, ...]] = ("trap", "paravirt", "forbid")
# Wall clock, for a guest that hangs: a run takes 10 s, on a machine that has much else to do 200 s.
MAX_SECONDS: Final = 900
MAX_PLACES: Final = 20
# A converted instruction, as arch/x86/include/asm/alternative.h would have it: the site is
# padded to the length of a CALL, which is the replacement, and there is a struct alt_instr.
CALL: Final = 5

METHOD: Final = {
    "#VEs": "counted when the software TDX module delivers them",
    "MMIO accesses without #VE": "counted when a site that the scan has makes the host call "
    "itself, the instruction being carried out as a conversion would",
    "MMIO accesses missed": "#VEs for MMIO in the design that should have none; their places "
    "are below",
    "sites to convert": "MMIO instructions in the scan of vmlinux and the modules that the "
    "workload loads",
    "of them used": "places among these that made an access in this run",
    "code growth": f"for each site max(0, {CALL} - its length) bytes of padding, a {CALL}-byte "
    "CALL as replacement and this kernel's struct alt_instr; calculated, not compiled, without "
    "what moves operands into registers for the call",
    "NMIs": "sent to the guest; this workload sends none by itself, trapline explore does",
    "#VEs in NMI": "#VEs while NMIs were blocked; says something only where there were NMIs",
    "#VEs in the #VE handler": "#VEs after a #VE and before the TDVMCALL that serves it",
    "screams": "accesses that the design forbids; the access is then made all the same",
    "virtual time": "the guest's own clock from start to power-off; real where it waits for "
    "a device",
    "wall time": "of the run, with QEMU's start, without scan and symbols; one measurement",
}

Prepare = Callable[["BootPlan"], "ScanResult"]


def compare(
    files: "KernelFiles",
    scan: Prepare,
    *,
    module_version: str = DEFAULT_VERSION,
    announce: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TradeoffResult:
    """Run the workload on a kernel under all designs.

    `scan` gives the scan of the kernel and modules of a plan. Raises a TraplineError for what
    cannot be booted.
    """
    results: list[tuple[Design, BootResult]] = []
    process.find()  # before half a minute of scanning
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="trapline-"))
        work = stack.enter_context(Workload(Path(folder)))
        plan = _plan(files, work, "trap", module_version, announce)
        known = scan(plan)
        symbols = open_symbols(plan)
        if symbols is not None:
            stack.enter_context(symbols)
        for number, name in enumerate(DESIGNS):
            results.append(_run(files, work, name, known, symbols, module_version))
            if progress is not None:
                progress(number + 1, len(DESIGNS))
    boots = [boot for _, boot in results]
    return TradeoffResult(
        generator=GENERATOR,
        kernel=boots[0].kernel,
        module_version=module_version,
        devices=tuple(f"{device.id} {device.name}" for device in boots[0].devices),
        designs=tuple(design for design, _ in results),
        missed_places=_missed(boots[DESIGNS.index("paravirt")]),
        method=METHOD,
    )


def _plan(
    files: "KernelFiles",
    work: Workload,
    name: DesignName,
    module_version: str,
    announce: Callable[[str], None] | None = None,
) -> "BootPlan":
    board, requests = parse_devices(work.devices)
    options = BootOptions(
        command_line=COMMAND_LINE,
        insmod=MODULES,
        init=work.init,
        board=board,
        devices=requests,
        module_version=module_version,
        timeout=MAX_SECONDS,
        guard=Guard(classes={"mmio": name} if name != "trap" else {}),
    )
    return make_plan(files, options, announce)


def _run(
    files: "KernelFiles",
    work: Workload,
    name: DesignName,
    scan: "ScanResult",
    symbols: "Binary | None",
    module_version: str,
) -> "tuple[Design, BootResult]":
    console = bytearray()
    plan = _plan(files, work, name, module_version)
    start = time.monotonic()
    with BootRun(plan, symbols, reproduce="", echo=console.extend, scan=scan) as run:
        outcome = run.run()
        wall = time.monotonic() - start
        boot = run.result(outcome, scan)
    steps = work.check(bytes(console))
    entry = (Alternatives([]) if symbols is None else symbols.alternatives).entry_size
    converts = name != "trap"
    sites = [site for site in scan.sites if site.trap == "mmio" and site.form == "instruction"]
    used = {site.scan_id for site in boot.sites if site.trap == "mmio" and site.scan_id}
    design = Design(
        name=name,
        steps=steps,
        outcome=outcome.kind.value,
        ves=sum(boot.traps.values()),
        mmio_ves=boot.traps.get("mmio", 0),
        direct=boot.policy.paravirtualised.get("mmio", 0),
        missed=boot.policy.missed.get("mmio", 0),
        tdvmcalls=sum(boot.tdvmcalls.values()) + boot.policy.paravirtualised.get("mmio", 0),
        convert=len(sites) if converts else 0,
        convert_used=len(used) or (run.guard.places if name == "paravirt" else 0),
        growth=sum(growth(len(site.bytes) // 2, entry) for site in sites)
        if name == "paravirt"
        else 0,
        nmis=run.machine.nmis,
        in_nmi=boot.in_nmi,
        nested=boot.nested,
        screams=sum(scream.count for scream in boot.screams),
        scream_places=len(boot.screams),
        virtual_seconds=outcome.cycles / run.machine.frequency,
        wall_seconds=wall,
    )
    return design, boot


def growth(length: int, entry: int) -> int:
    """Return the bytes that converting an instruction of `length` bytes adds.

    `entry` is the size of the kernel's struct alt_instr.
    """
    return max(0, CALL - length) + CALL + entry


def _missed(boot: "BootResult") -> tuple[str, ...]:
    places = [
        f"{site.label}: {site.reason or 'the form, or the host refuses the call'}"
        for site in boot.sites
        if site.trap == "mmio"
    ]
    return tuple(places[:MAX_PLACES])
