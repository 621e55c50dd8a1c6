"""What is said of a boot: how it ended, and where it trapped."""

from typing import TYPE_CHECKING, Final

from trapline.report.blocks import Code, Details, Gap, Heading, Paragraph, Table, Term
from trapline.report.pages import splat
from trapline.report.pages.said import said
from trapline.report.words import counted
from trapline.results.boot import CONTEXTS, FORBIDDEN_CONTEXTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trapline.report.blocks import Block
    from trapline.results.boot import BootDevice, BootResult, RunProgram, TrapSite

_TOP: Final = 20
_SPLATS: Final = 2
_FRAMES: Final = 3
_MIB: Final = 1 << 20


def page(result: "BootResult", verbosity: int = 0) -> "Iterator[Block]":
    """Yield the report's blocks. `verbosity` 1 lists every place that trapped."""
    parts = [
        _head(result),
        _milestones(result),
        _classes(result),
        _contexts(result),
        _other_module(result, verbosity),
        _calls(result),
        _devices(result),
        _policy(result),
        _screams(result, verbosity),
        _sites(result, verbosity),
        said(result, result.labels),
        _soundness(result),
        _refused(result),
        _hashes(result),
    ]
    if result.splat is not None:
        parts.insert(1, splat.page(result.splat))
    parts.insert(1, _complaints(result, verbosity))
    parts.insert(1, _tasks(result, verbosity))
    first = True
    for part in parts:
        blocks = list(part)
        if not blocks:
            continue
        if not first:
            yield Gap()
        first = False
        yield from blocks


def _head(result: "BootResult") -> "Iterator[Block]":
    kernel, machine, outcome = result.kernel, result.machine, result.outcome
    unaccepted = f", {machine.unaccepted // _MIB} MiB unaccepted" if machine.unaccepted else ""
    yield Paragraph(
        f"{kernel.release or kernel.file} ({kernel.image}) as a TD: TDX module "
        f"{machine.module_version}, {machine.memory // _MIB} MiB{unaccepted}, one VCPU, no TDX "
        "hardware."
    )
    yield Paragraph(f"Command line: {machine.command_line}", hanging=2)
    if kernel.slide is not None and int(kernel.slide, 16):
        yield Paragraph(f"KASLR slide: {kernel.slide}")
    yield Gap()
    yield Paragraph(
        f"{outcome.kind} after {outcome.seconds:.3f} s of virtual time. {outcome.detail}"
    )
    if outcome.exit_code:
        yield Paragraph(f"The guest was at {outcome.place}.")
    if result.program is not None:
        yield Paragraph(_program(result.program))


def _tasks(result: "BootResult", verbosity: int) -> "Iterator[Block]":
    """Say what a guest that came to no end waits for: all but idle kernel threads, or all."""
    if not result.tasks:
        return
    shown = [task for task in result.tasks if verbosity or task.pid == 1 or task.state != "I"]
    if result.last_line:
        yield Paragraph(f"The last line of its console: {result.last_line}", hanging=2)
        yield Gap()
    yield Heading(f"What its tasks wait for: {len(shown)} of {counted(len(result.tasks), 'task')}")
    for task in shown:
        running = ", running" if task.is_running else ""
        trace = task.trace if verbosity or task.pid == 1 else task.trace[:_FRAMES]
        head = f"{task.comm} (PID {task.pid}) {task.state}{running}"
        yield Code((head, *(f"  {label}" for label in trace)))


def _program(program: "RunProgram") -> str:
    printed = f"it printed {program.out:,} bytes, and {program.err:,} of errors"
    if program.exit_code is None:
        return f"The guest ended before {program.name} told its exit code; {printed}."
    return f"{program.name} exited with {program.exit_code}; {printed}."


def _complaints(result: "BootResult", verbosity: int) -> "Iterator[Block]":
    """Say what the kernel lived on after, and show what went wrong first."""
    found = result.complaints
    if not found:
        return
    total = sum(one.count for one in found)
    yield Heading(f"The guest's kernel complained {counted(total, 'time')}")
    for one in found:
        what = one.kind if one.fails else f"{one.kind}, put up with"
        times = "" if one.count == 1 else f", first of {one.count:,}"
        yield Paragraph(f"{what} at {one.seconds:.6f} s{times}: {one.text}", indent=2, hanging=2)
    splats = [one.splat for one in found if one.splat is not None]
    for shown in splats if verbosity else splats[:1]:
        yield Gap()
        yield from splat.page(shown)


def _milestones(result: "BootResult") -> "Iterator[Block]":
    if result.milestones:
        yield Heading("Milestones (virtual time)")
        rows = [(f"{m.seconds:10.6f} s", m.name, m.evidence) for m in result.milestones]
        yield Table(("time", "reached", "seen by"), tuple(rows))


def _classes(result: "BootResult") -> "Iterator[Block]":
    yield Heading(f"{counted(sum(result.traps.values()), '#VE')} by class")
    places: dict[str, int] = {}
    users: dict[str, int] = {}
    for site in result.sites:
        if site.trap == "tdcall":
            continue
        places[site.trap] = places.get(site.trap, 0) + 1
        if site.image == "user":
            users[site.trap] = users.get(site.trap, 0) + site.count
    rows = [
        (name, count, places.get(name, 0), users.get(name, 0))
        for name, count in result.traps.items()
    ]
    yield Table(("class", "traps", "places", "from ring 3"), tuple(rows))


def _contexts(result: "BootResult") -> "Iterator[Block]":
    """Show in which contexts the #VEs came, and mark those in which none may."""
    seen = [name for name in CONTEXTS if any(name in found for found in result.contexts.values())]
    if not seen:
        return
    yield Heading("#VEs by context (one may be in several; most are in none)")
    names = tuple(name for name in result.traps if result.contexts.get(name))
    rows = tuple(
        (
            f"{context}: FORBIDDEN" if context in FORBIDDEN_CONTEXTS else context,
            *(f"{result.contexts[name].get(context, 0):,}" for name in names),
        )
        for context in seen
    )
    yield Table(("", *names), rows, right=True)


def _other_module(result: "BootResult", verbosity: int) -> "Iterator[Block]":
    """Tell the #VEs of the same boot on two modules, side by side."""
    other = result.other_module
    if other is None:
        return
    here, there = result.machine.module_version, other.module_version
    yield Heading(f"The same boot on TDX module {there}")
    names = dict.fromkeys((*result.traps, *other.traps))
    rows = [(name, result.traps.get(name, 0), other.traps.get(name, 0)) for name in names]
    rows.append(("all", sum(result.traps.values()), sum(other.traps.values())))
    told = [(name, one, two, f"{two - one:+,}") for name, one, two in rows]
    yield Table(("#VE", here, there, "change"), tuple(told))
    yield Gap()
    yield Paragraph(
        f"Places that trap on {here} and not on {there}: {len(other.gone)}; the other way round: "
        f"{len(other.new)}. On {there}: {other.outcome.kind} after "
        f"{other.outcome.seconds:.3f} s. {other.outcome.detail}"
    )
    if verbosity:
        for word, places in ((f"only on {here}", other.gone), (f"only on {there}", other.new)):
            yield from (Paragraph(f"{word}: {place}", indent=2, hanging=2) for place in places)


def _calls(result: "BootResult") -> "Iterator[Block]":
    yield Heading(f"{counted(sum(result.tdcalls.values()), 'TDCALL')} by leaf")
    yield Table(("TDCALL", "calls"), tuple(result.tdcalls.items()))
    yield Gap()
    yield Heading("TDG.VP.VMCALL by sub-function")
    yield Table(("TDVMCALL", "calls"), tuple(result.tdvmcalls.items()))


def _devices(result: "BootResult") -> "Iterator[Block]":
    if not result.devices:
        return
    yield Heading("Devices (QEMU's models)")
    rows = [
        (device.slot, device.id, device.name, _standing(device), " + ".join(device.drivers))
        for device in result.devices
    ]
    yield Table(("slot", "id", "device", "on the list", "driver bound"), tuple(rows))


def _standing(device: "BootDevice") -> str:
    if device.allowed is None:
        return "-"
    return "yes" if device.allowed else "no, hidden" if device.hidden else "no"


def _policy(result: "BootResult") -> "Iterator[Block]":
    policy = result.policy
    if not policy.classes:
        return
    yield Heading("Policy")
    rows = []
    for name, mode in policy.classes.items():
        done, missed = policy.paravirtualised.get(name, 0), policy.missed.get(name, 0)
        rows.append((name, mode, done, missed) if mode == "paravirt" else (name, mode, "", ""))
    yield Table(("class", "mode", "without #VE", "#VE all the same"), tuple(rows))
    missed_sites = [site for site in result.sites if policy.classes.get(site.trap) == "paravirt"]
    if missed_sites:
        yield Gap()
        yield Heading("A conversion would have missed these")
        yield Table(
            ("traps", "class", "place", "why"),
            tuple(
                (
                    site.count,
                    site.trap,
                    site.label,
                    site.reason or "the form, or the host refuses the call",
                )
                for site in missed_sites[:_TOP]
            ),
        )


def _screams(result: "BootResult", verbosity: int) -> "Iterator[Block]":
    screams = result.screams
    if not screams:
        return
    total = sum(scream.count for scream in screams)
    yield Heading(f"{counted(total, 'scream')} from {counted(len(screams), 'place')}")
    rows = [
        (scream.count, scream.trap, scream.address, scream.label, scream.driver or "")
        for scream in (screams if verbosity else screams[:_TOP])
    ]
    yield Table(("times", "class", "address", "place", "driver"), tuple(rows))
    yield from _dropped(result.screams_dropped, "scream", len(screams))
    splats = [scream.splat for scream in screams if scream.splat is not None]
    for one in splats if verbosity else splats[:_SPLATS]:
        yield Gap()
        yield Details(one.banner, tuple(splat.page(one)))


def _sites(result: "BootResult", verbosity: int) -> "Iterator[Block]":
    sites = result.sites if verbosity else result.sites[:_TOP]
    yield Heading(f"Where it trapped: {len(sites)} of {counted(len(result.sites), 'place')}")
    if verbosity:
        for site in sites:
            yield Code(tuple(_detail(site)))
        yield from _dropped(result.sites_dropped, "trap", len(result.sites))
        return
    yield Table(("traps", "class", "function", "source"), tuple(map(_row, sites)))
    yield from _dropped(result.sites_dropped, "trap", len(result.sites))
    if len(sites) < len(result.sites):
        yield Paragraph("(-v lists all, with their inline chains)")


def _dropped(count: int, what: str, places: int) -> "Iterator[Block]":
    """Say what a guest that traps everywhere did beyond what is kept."""
    if count:
        yield Paragraph(
            f"NOT LISTED: {counted(count, what)} from other places than these {places:,}."
        )


def _row(site: "TrapSite") -> tuple[int, str, str, str]:
    return site.count, site.trap, site.label, _source(site)


def _source(site: "TrapSite") -> str:
    return "" if site.file is None else f"{site.file}:{site.line or '?'}"


def _detail(site: "TrapSite") -> "Iterator[str]":
    found = f"scan {site.scan_id}" if site.scan_id else site.reason
    yield f"{site.count:>9,}  {site.trap:<7} {site.label}  [{found}]"
    for frame in site.inlined:
        source = "??" if frame.file is None else f"{frame.file}:{frame.line or '?'}"
        yield f"{'':18} {frame.function} (inlined) {source}"
    if not site.inlined and site.file is not None:
        yield f"{'':18} {_source(site)}"


def _soundness(result: "BootResult") -> "Iterator[Block]":
    sound = result.soundness
    if not sound.scanned:
        yield Paragraph("Soundness: not measured, as there is no scan to compare with.")
        return
    yield Paragraph(
        f"Soundness: the scan had foreseen {_share(sound.traps_found, sound.traps)} of the #VEs "
        f"and TDCALLs ({sound.traps_found:,} of {sound.traps:,}) and {sound.sites_found:,} of "
        f"the {counted(sound.sites, 'place')} they came from; {sound.outside_traps:,} more came "
        "from code that it does not cover by design (ring 3, decompressor)."
    )
    if result.unaccounted:
        yield Gap()
        yield Heading("Not accounted for")
        yield Table(("traps", "class", "place", "why"), tuple(map(_why, result.unaccounted)))


def _why(site: "TrapSite") -> tuple[int, str, str, str]:
    return site.count, site.trap, site.label, site.reason


def _share(part: int, whole: int) -> str:
    # Rounded down: 100 % means all of them.
    return f"{10_000 * part // whole / 100:.2f} %" if whole else "none"


def _refused(result: "BootResult") -> "Iterator[Block]":
    refused = result.refused
    named = (
        ("ports where no device is", refused.ports),
        ("MMIO where no device is", refused.mmio),
        ("MSRs that the host does not have", refused.msrs),
    )
    if refused.dma:
        yield Paragraph(f"DMA to private GPA {', '.join(refused.dma)} was refused.")
    if any(counts for _, counts in named):
        yield Heading("Asked for and not there (address x times)")
    for name, counts in named:
        if counts:
            yield Paragraph(f"{name}: {_list(counts.items())}", indent=2, hanging=2)


def _list(counts: "Iterable[tuple[str, int]]") -> str:
    return ", ".join(address if count == 1 else f"{address} x{count}" for address, count in counts)


def _hashes(result: "BootResult") -> "Iterator[Block]":
    if result.repeatable:
        yield Heading("Hashes (the same for every run of this command)")
    else:
        yield Heading("Hashes (of this run: the wall clock has its say)")
    hashes = result.hashes
    for name, value in (
        ("trace", hashes.trace),
        ("console", hashes.console),
        ("memory", hashes.ram),
    ):
        yield Term(name, value, indent=2, width=9)
