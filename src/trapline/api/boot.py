"""`boot`: a kernel as a TD on a software TDX module."""

from contextlib import ExitStack
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trapline.api.allow import allow_list
from trapline.api.kernel import as_kernel
from trapline.api.known_scan import KnownScan
from trapline.api.label import known_labels, with_labels
from trapline.api.several import several
from trapline.base.errors import UsageError
from trapline.boot.othermodule import beside
from trapline.boot.plan import (
    BootOptions,
    make_plan,
    open_symbols,
    parse_devices,
    without_boot_image,
)
from trapline.boot.policy import Guard, parse
from trapline.boot.program import PORTS, ProgramOutput, read_program
from trapline.boot.run import BootRun, GdbAt, trace_header
from trapline.boot.session import VIRTUAL_SECONDS, Session
from trapline.boot.trace import TraceWriter
from trapline.machine.devices.console import DEFAULT_LIMIT
from trapline.machine.gdb.server import GdbServer
from trapline.machine.loader.acpifile import read_table
from trapline.machine.loader.gpamap import DEFAULT_MEMORY
from trapline.machine.machine import DEFAULT_VIRTUAL_SECONDS
from trapline.results.boot import COMPLAINT_KINDS
from trapline.rules.tables import DEFAULT_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from trapline.api.allow import AnyAllowList
    from trapline.api.kernel import AnyKernel, AnyPath
    from trapline.api.known_scan import AnyScan
    from trapline.api.label import AnyLabels
    from trapline.api.progress import Announce, OnProgress
    from trapline.results.boot import BootResult, ComplaintKind

AllowMode = Literal["hide", "report"]
OnForbidden = Literal["report", "panic"]


def boot(
    kernel: "AnyKernel",
    *,
    modules: "AnyPath | None" = None,
    initrd: "AnyPath | None" = None,
    insmod: "str | Iterable[str]" = (),
    append: "str | Iterable[str]" = (),
    cmdline: str | None = None,
    memory: int = DEFAULT_MEMORY,
    unaccepted: int = 0,
    devices: "str | Iterable[str]" = (),
    acpi_tables: "AnyPath | Iterable[AnyPath]" = (),
    allow: "AnyAllowList" = None,
    allow_mode: AllowMode = "hide",
    policies: "Mapping[str, str] | None" = None,
    on_forbidden: OnForbidden = "report",
    module_version: str = DEFAULT_VERSION,
    compare_module: str | None = None,
    scan: "AnyScan" = True,
    trace: "AnyPath | None" = None,
    gdb: str | None = None,
    gdb_at: GdbAt = "kernel",
    fail_on: "str | Iterable[str] | None" = None,
    timeout: float | None = None,
    console_limit: int = DEFAULT_LIMIT,
    reproduce: str = "",
    run: "AnyPath | None" = None,
    session: Session | None = None,
    keyboard: int | None = None,
    console: "Callable[[bytes], None] | None" = None,
    output: "Callable[[bytes], None] | None" = None,
    errors: "Callable[[bytes], None] | None" = None,
    labels: "AnyLabels" = None,
    progress: "OnProgress | None" = None,
    announce: "Announce | None" = None,
) -> "BootResult":
    """Run a kernel as a TD to its end, and account for every trap.

    Sizes are in bytes, times in seconds. `initrd` replaces the self-test, for which `insmod`
    names modules to load. `append` goes behind the kernel's command line, `cmdline` replaces it.
    `unaccepted` memory, at the end of `memory`, is left for the guest to accept. `devices` are
    named as for `--device`. `acpi_tables` are files, each of one table. `policies` map "mmio",
    "pio", "msr" and "cpuid" to "trap", "paravirt" or "forbid"; unlike elsewhere, no `allow` means
    no allow list. Traps are looked up in `scan`: a scan of this kernel, the JSON file of one, True
    to make it once into the cache,
    False for none. With `compare_module` the boot is made once more, on that version of the TDX
    module, and its #VEs are told beside. `trace` is written as JSON Lines. `gdb` is an address to
    wait for a debugger at: before the "start", or in the "kernel", where KASLR has chosen
    (`gdb_at`). `fail_on` names the complaints of the guest's kernel that are not put up with, all
    of them if None: "oops", "bug", "warning", "soft-lockup", "hard-lockup", "rcu-stall",
    "hung-task".
    `timeout` is of wall-clock time; a guest that prints more than `console_limit` is ended, too.
    `reproduce` is the command that does the same, for the splat of a guest that dies. `console`
    gets the guest's output as it is written. `run` is a script or a static program that the guest
    is booted for: `output` and `errors` get what it prints, the result says what it exits with.
    `labels` are what people said of findings.
    What comes from the file descriptor `keyboard` is typed on the guest's console, which is then
    shown as it comes, and time is real; `session` is an initramfs for a person at it.

    A guest that dies is a result, not an error. Raises KernelNotFoundError, BadImageError,
    NotATdxKernelError, BadMachineError, BadInputFileError, UsageError, OutputError, FetchError,
    ToolMissingError.
    """
    if timeout is not None and not timeout > 0:  # written so that NaN fails too
        raise UsageError(
            f"a timeout of {timeout} seconds leaves no time to run; give more, or none."
        )
    board, requests = parse_devices(several(devices))
    program = None if run is None else read_program(Path(run))
    if program is not None:
        board = replace(board, further_ports=PORTS)
    paths = (acpi_tables,) if isinstance(acpi_tables, str | PathLike) else tuple(acpi_tables)
    board = replace(board, tables=tuple(read_table(Path(path)) for path in paths))
    guard = _guard(allow, allow_mode, policies, on_forbidden)
    if guard.needs_scan and scan is False:
        raise UsageError("--policy and --allow-mode report need a scan; leave --no-scan out.")
    options = BootOptions(
        initrd=None if initrd is None else Path(initrd),
        command_line=cmdline,
        append=several(append),
        insmod=several(insmod),
        program=program,
        session=session,
        keyboard=keyboard,
        virtual_seconds=DEFAULT_VIRTUAL_SECONDS if keyboard is None else VIRTUAL_SECONDS,
        memory=memory,
        unaccepted=unaccepted,
        board=board,
        devices=requests,
        guard=guard,
        module_version=module_version,
        fail_on=_complaints(fail_on),
        timeout=timeout,
        console_limit=console_limit,
    )
    labelled = known_labels(labels)
    known = KnownScan.of(scan)
    opened = as_kernel(kernel, modules, announce)
    with ExitStack() as stack:
        plan = make_plan(without_boot_image(opened.files, opened.name), options, announce)
        build_id = plan.image.build_id
        known.require(build_id)
        symbols = stack.enter_context(open_symbols(plan))
        writer = None
        if trace is not None:
            writer = stack.enter_context(TraceWriter(Path(trace), trace_header(plan)))
        # What an initrd of the user's loads is not known; the scan is then of vmlinux alone.
        loadable = plan.modules if initrd is None else ()
        found = known.given
        if guard.needs_scan:
            found = known.make(plan.files, loadable, build_id, progress)
        said = None
        if program is not None:
            said = ProgramOutput(program.name, output or _drop, errors or _drop)
        booted = stack.enter_context(
            BootRun(
                plan,
                symbols,
                reproduce=reproduce,
                echo=console,
                sink=writer,
                scan=found,
                program=said,
            )
        )
        server = None
        if gdb is not None:
            target, say = booted.debug_target(), announce or _ignore
            server = stack.enter_context(
                GdbServer(gdb, booted.machine.vcpu, target, say, vmlinux=plan.files.vmlinux)
            )
        outcome = booted.run(server, gdb_at)
        if said is not None:
            said.flush()
        found = found or known.make(plan.files, loadable, build_id, progress)
        result = booted.result(outcome, found)
        if compare_module is None:
            return with_labels(result, labelled)
        again = replace(plan, options=replace(options, module_version=compare_module))
        unheard = None if program is None else ProgramOutput(program.name, _drop, _drop)
        other = stack.enter_context(
            BootRun(again, symbols, reproduce="", scan=found, program=unheard)
        )
        return with_labels(beside(result, other.result(other.run(), found)), labelled)


def _guard(
    allow: "AnyAllowList",
    allow_mode: AllowMode,
    policies: "Mapping[str, str] | None",
    on_forbidden: OnForbidden,
) -> Guard:
    """Say what the run is to watch over. Raises UsageError for what makes no sense."""
    guard = Guard(
        classes=parse(f"{name}={mode}" for name, mode in (policies or {}).items()),
        allow=None if allow is None else allow_list(allow),
        hide=allow_mode == "hide",
        panic=on_forbidden == "panic",
    )
    if allow is None and not guard.hide:
        raise UsageError("--allow-mode report is about an allow list; name it with --allow.")
    if guard.panic and "forbid" not in guard.classes.values():
        raise UsageError(
            "--on-forbidden panic needs a class that is forbidden: --policy CLASS=forbid."
        )
    return guard


def _complaints(fail_on: "str | Iterable[str] | None") -> "frozenset[ComplaintKind]":
    """Name those that are not put up with; raises UsageError for what nobody complains of."""
    if fail_on is None:
        return COMPLAINT_KINDS
    names = set(several(fail_on)) - {"none"}
    if names - COMPLAINT_KINDS:
        raise UsageError(
            f"no kernel complains of {min(names - COMPLAINT_KINDS)!r}; fail_on takes "
            f"{', '.join(sorted(COMPLAINT_KINDS))}, or none."
        )
    return frozenset(kind for kind in COMPLAINT_KINDS if kind in names)


def _drop(data: bytes) -> None:
    del data


def _ignore(line: str) -> None:
    del line
