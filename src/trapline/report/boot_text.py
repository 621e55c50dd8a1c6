"""A boot in 80-column text that pastes into a mail: how it ended, and where it trapped."""

from itertools import chain
from typing import TYPE_CHECKING, Final

from trapline.base.printable import printable_ascii
from trapline.report.splat import render_splat
from trapline.report.table import counted, paragraph, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trapline.results.boot import BootDevice, BootResult, TrapSite

_TOP: Final = 20
_SPLATS: Final = 2
_MIB: Final = 1 << 20


def render(result: "BootResult", verbosity: int = 0) -> "Iterator[bytes]":
    """Yield the report line by line, UTF-8 encoded."""
    for line in _lines(result, verbosity):
        yield line.encode() + b"\n"


def _lines(result: "BootResult", verbosity: int) -> "Iterator[str]":
    parts = [
        _head(result),
        _milestones(result),
        _classes(result),
        _calls(result),
        _devices(result),
        _policy(result),
        _screams(result, verbosity),
        _sites(result, verbosity),
        _soundness(result),
        _refused(result),
        _hashes(result),
    ]
    if result.splat is not None:
        parts.insert(1, render_splat(result.splat))
    first = True
    for part in parts:
        lines = list(part)
        if not lines:
            continue
        if not first:
            yield ""
        first = False
        yield from lines


def _head(result: "BootResult") -> "Iterator[str]":
    kernel, machine, outcome = result.kernel, result.machine, result.outcome
    unaccepted = f", {machine.unaccepted // _MIB} MiB unaccepted" if machine.unaccepted else ""
    yield from paragraph(
        f"{kernel.release or kernel.file} ({kernel.image}) as a TD: TDX module "
        f"{machine.module_version}, {machine.memory // _MIB} MiB{unaccepted}, one VCPU, no TDX "
        "hardware."
    )
    yield from paragraph(f"Command line: {machine.command_line}", hanging="  ")
    if kernel.slide is not None and int(kernel.slide, 16):
        yield f"KASLR slide: {kernel.slide}"
    yield ""
    yield from paragraph(
        f"{outcome.kind} after {outcome.seconds:.3f} s of virtual time. {outcome.detail}"
    )
    if outcome.exit_code:
        yield from paragraph(f"The guest was at {outcome.place}.")


def _milestones(result: "BootResult") -> "Iterator[str]":
    if result.milestones:
        yield "Milestones (virtual time)"
        rows = [(f"{m.seconds:10.6f} s", m.name, m.evidence) for m in result.milestones]
        yield from table(("time", "reached", "seen by"), rows)


def _classes(result: "BootResult") -> "Iterator[str]":
    yield f"{counted(sum(result.traps.values()), '#VE')} by class"
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
    yield from table(("class", "traps", "places", "from ring 3"), rows)


def _calls(result: "BootResult") -> "Iterator[str]":
    yield f"{counted(sum(result.tdcalls.values()), 'TDCALL')} by leaf"
    yield from table(("TDCALL", "calls"), list(result.tdcalls.items()))
    yield ""
    yield "TDG.VP.VMCALL by sub-function"
    yield from table(("TDVMCALL", "calls"), list(result.tdvmcalls.items()))


def _devices(result: "BootResult") -> "Iterator[str]":
    if not result.devices:
        return
    yield "Devices (QEMU's models)"
    rows = [
        (device.slot, device.id, device.name, _standing(device), " + ".join(device.drivers))
        for device in result.devices
    ]
    yield from table(("slot", "id", "device", "on the list", "driver bound"), rows)


def _standing(device: "BootDevice") -> str:
    if device.allowed is None:
        return "-"
    return "yes" if device.allowed else "no, hidden" if device.hidden else "no"


def _policy(result: "BootResult") -> "Iterator[str]":
    policy = result.policy
    if not policy.classes:
        return
    yield "Policy"
    rows = []
    for name, mode in policy.classes.items():
        done, missed = policy.paravirtualised.get(name, 0), policy.missed.get(name, 0)
        rows.append((name, mode, done, missed) if mode == "paravirt" else (name, mode, "", ""))
    yield from table(("class", "mode", "without #VE", "#VE all the same"), rows)
    missed_sites = [site for site in result.sites if policy.classes.get(site.trap) == "paravirt"]
    if missed_sites:
        yield ""
        yield "A conversion would have missed these"
        yield from table(
            ("traps", "class", "place", "why"),
            [
                (
                    site.count,
                    site.trap,
                    site.label,
                    site.reason or "the form, or the host refuses the call",
                )
                for site in missed_sites[:_TOP]
            ],
        )


def _screams(result: "BootResult", verbosity: int) -> "Iterator[str]":
    screams = result.screams
    if not screams:
        return
    total = sum(scream.count for scream in screams)
    yield f"{counted(total, 'scream')} from {counted(len(screams), 'place')}"
    rows = [
        (scream.count, scream.trap, scream.address, scream.label, scream.driver or "")
        for scream in (screams if verbosity else screams[:_TOP])
    ]
    yield from table(("times", "class", "address", "place", "driver"), rows)
    splats = [scream.splat for scream in screams if scream.splat is not None]
    for splat in splats if verbosity else splats[:_SPLATS]:
        yield ""
        yield from render_splat(splat)


def _sites(result: "BootResult", verbosity: int) -> "Iterator[str]":
    sites = result.sites if verbosity else result.sites[:_TOP]
    yield f"Where it trapped: {len(sites)} of {counted(len(result.sites), 'place')}"
    if verbosity:
        yield from chain.from_iterable(_detail(site) for site in sites)
        return
    yield from table(("traps", "class", "function", "source"), [_row(site) for site in sites])
    if len(sites) < len(result.sites):
        yield "(-v lists all, with their inline chains)"


def _row(site: "TrapSite") -> tuple[int, str, str, str]:
    return site.count, site.trap, site.label, _source(site)


def _source(site: "TrapSite") -> str:
    return "" if site.file is None else f"{site.file}:{site.line or '?'}"


def _detail(site: "TrapSite") -> "Iterator[str]":
    found = f"scan {site.scan_id}" if site.scan_id else site.reason
    yield printable_ascii(f"{site.count:>9,}  {site.trap:<7} {site.label}  [{found}]")
    for frame in site.inlined:
        source = "??" if frame.file is None else f"{frame.file}:{frame.line or '?'}"
        yield printable_ascii(f"{'':18} {frame.function} (inlined) {source}")
    if not site.inlined and site.file is not None:
        yield printable_ascii(f"{'':18} {_source(site)}")


def _soundness(result: "BootResult") -> "Iterator[str]":
    sound = result.soundness
    if not sound.scanned:
        yield from paragraph("Soundness: not measured, as there is no scan to compare with.")
        return
    yield from paragraph(
        f"Soundness: the scan had foreseen {_share(sound.traps_found, sound.traps)} of the #VEs "
        f"and TDCALLs ({sound.traps_found:,} of {sound.traps:,}) and {sound.sites_found:,} of "
        f"the {counted(sound.sites, 'place')} they came from; {sound.outside_traps:,} more came "
        "from code that it does not cover by design (ring 3, decompressor)."
    )
    if result.unaccounted:
        yield ""
        yield "Not accounted for"
        yield from table(
            ("traps", "class", "place", "why"), [_why(site) for site in result.unaccounted]
        )


def _why(site: "TrapSite") -> tuple[int, str, str, str]:
    return site.count, site.trap, site.label, site.reason


def _share(part: int, whole: int) -> str:
    # Rounded down: 100 % means all of them.
    return f"{10_000 * part // whole / 100:.2f} %" if whole else "none"


def _refused(result: "BootResult") -> "Iterator[str]":
    refused = result.refused
    named = (
        ("ports where no device is", refused.ports),
        ("MMIO where no device is", refused.mmio),
        ("MSRs that the host does not have", refused.msrs),
    )
    if refused.dma:
        yield from paragraph(f"DMA to private GPA {', '.join(refused.dma)} was refused.")
    if any(counts for _, counts in named):
        yield "Asked for and not there (address x times)"
    for name, counts in named:
        if counts:
            yield from paragraph(f"{name}: {_list(counts.items())}", indent="  ", hanging="    ")


def _list(counts: "Iterable[tuple[str, int]]") -> str:
    return ", ".join(address if count == 1 else f"{address} x{count}" for address, count in counts)


def _hashes(result: "BootResult") -> "Iterator[str]":
    if result.repeatable:
        yield "Hashes (the same for every run of this command)"
    else:
        yield "Hashes (of this run: with devices, the wall clock has its say)"
    yield f"  trace    {result.hashes.trace}"
    yield f"  console  {result.hashes.console}"
    yield f"  memory   {result.hashes.ram}"
