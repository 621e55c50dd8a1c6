"""What is said of the three designs: one table, and how each number was got."""

from typing import TYPE_CHECKING, Final

from trapline.report.blocks import Gap, Heading, Paragraph, Table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.report.blocks import Block
    from trapline.results.tradeoff import Design, TradeoffResult

_TITLES: Final = {"trap": "#VE trapping", "paravirt": "paravirtualised", "forbid": "no MMIO"}


def page(result: "TradeoffResult", verbosity: int = 0) -> "Iterator[Block]":
    """Yield the report's blocks."""
    del verbosity
    yield Paragraph(
        f"{result.kernel.release or result.kernel.file}: one workload (boot, disk read, network "
        "request, console output) as a TD with MMIO under three designs. TDX module "
        f"{result.module_version}, no TDX hardware. "
        f"Devices: {', '.join(result.devices)}."
    )
    yield Gap()
    header = ("", *(_TITLES[design.name] for design in result.designs))
    rows = tuple((name, *cells) for name, cells in _rows(result.designs))
    yield Table(header, rows, right=True)
    yield Gap()
    if result.missed_places:
        yield Heading("MMIO that a conversion of the scanned sites would have missed")
        for place in result.missed_places:
            yield Paragraph(place, indent=2, hanging=2)
        yield Gap()
    yield Heading("How each number was got")
    yield Table(("number", "method"), tuple(result.method.items()))


def _rows(designs: "tuple[Design, ...]") -> "Iterator[tuple[str, tuple[str, ...]]]":
    def row(name: str, *values: str) -> tuple[str, tuple[str, ...]]:
        return name, values

    yield row("workload correct", *(_correct(d) for d in designs))
    yield row("#VEs", *(f"{d.ves:,}" for d in designs))
    yield row("  of them for MMIO", *(f"{d.mmio_ves:,}" for d in designs))
    yield row("MMIO accesses without #VE", *(f"{d.direct:,}" for d in designs))
    yield row("MMIO accesses missed", *(_if(d.name == "paravirt", d.missed) for d in designs))
    yield row("TDVMCALLs", *(f"{d.tdvmcalls:,}" for d in designs))
    yield row("sites to convert", *(_if(d.name != "trap", d.convert) for d in designs))
    yield row("  of them used", *(_if(d.name != "trap", d.convert_used) for d in designs))
    yield row("code growth, bytes", *(_if(d.name == "paravirt", d.growth) for d in designs))
    yield row("NMIs", *(f"{d.nmis:,}" for d in designs))
    yield row("#VEs in NMI", *(f"{d.in_nmi:,}" for d in designs))
    yield row("#VEs in the #VE handler", *(f"{d.nested:,}" for d in designs))
    yield row("screams", *(_if(d.name == "forbid", d.screams) for d in designs))
    yield row("  from places", *(_if(d.name == "forbid", d.scream_places) for d in designs))
    yield row("virtual time, s", *(f"{d.virtual_seconds:.3f}" for d in designs))
    yield row("wall time, s", *(f"{d.wall_seconds:.1f}" for d in designs))


def _if(applies: bool, value: int) -> str:
    return f"{value:,}" if applies else "-"


def _correct(design: "Design") -> str:
    failed = [step.name for step in design.steps if not step.passed]
    return f"no: {failed[0]}" if failed else "yes"
