"""Several results of one kernel on one page: a part for each, and what they say of one site joined.

Sites of the scan get how often a boot executed them, by their ids.
"""

from typing import TYPE_CHECKING, Final

from trapline.base.errors import BadInputFileError
from trapline.report.formats.page import Column, render_page
from trapline.report.records import RECORDS, record_of
from trapline.results.boot import BootResult
from trapline.results.scan import ScanResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trapline.report.formats.page import Part
    from trapline.results.document import ResultDocument

_NEVER_RAN: Final = "never in a boot"


def render(documents: "Sequence[ResultDocument]") -> "Iterator[bytes]":
    """Yield one page of results, in the order in which a user meets the commands.

    Raises BadInputFileError where they are of two kernels.
    """
    _check(documents)
    order = [record.document for record in RECORDS]
    in_order = sorted(documents, key=lambda document: order.index(type(document)))
    boots = [document for document in in_order if isinstance(document, BootResult)]
    parts = [_part(document, boots) for document in in_order]
    return render_page(parts[0].headline if len(parts) == 1 else _title(parts), parts)


def _title(parts: "Sequence[Part]") -> str:
    return f"{parts[0].headline}, and {', '.join(part.title for part in parts[1:])}"


def _part(document: "ResultDocument", boots: "Sequence[BootResult]") -> "Part":
    part = record_of(document).part(document)
    if not isinstance(document, ScanResult):
        return part
    columns = [_ran(boot, number, len(boots)) for number, boot in enumerate(boots, 1)]
    return part.with_columns("sites", columns)


def _ran(boot: BootResult, number: int, of: int) -> Column:
    """Make a column of how often a boot executed each site."""
    counts: dict[str, int] = {}
    for site in boot.sites:
        if site.scan_id is not None:
            counts[site.scan_id] = counts.get(site.scan_id, 0) + site.count
    name = "boot" if of == 1 else f"boot {number}"
    return Column(name, {key: f"{count:,} traps" for key, count in counts.items()}, _NEVER_RAN)


def _check(documents: "Sequence[ResultDocument]") -> None:
    """Hold that all documents that name a build name the same."""
    builds: dict[str, str] = {}
    for document in documents:
        kernel = getattr(document, "kernel", None)
        build = getattr(kernel, "build_id", None)
        if build:
            builds.setdefault(build, record_of(document).command)
    if len(builds) > 1:
        one, other = list(builds.items())[:2]
        raise BadInputFileError(
            f"the results are of two kernels: {one[1]} of build id {one[0]}, {other[1]} of "
            f"{other[0]}; put those of one kernel on a page, and compare two with trapline diff."
        )
