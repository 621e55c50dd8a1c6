"""The places of a kernel that a gate counts, and the baseline of those that were there before.

Counted are places in the source for each function and kind of access, so that neither an edit above
them, nor another order of blocks, nor one more copy makes one of them new.
"""

import hashlib
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from trapline.base import decode, encode, files
from trapline.base.errors import BadInputFileError
from trapline.labels.subjects import subject_of
from trapline.results.findings import findings
from trapline.results.gate import BASELINE_SCHEMA, VERSION, GateBaseline

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from trapline.results.document import ResultDocument
    from trapline.results.scan import ScanResult, Site

_MOST: Final = 64 << 20  # bytes
_DIGITS: Final = 8  # of the functions of one object two are alike once in a million kernels

#: Object -> function and kind of access -> the sites of each place in the source.
Places = dict[str, dict[str, dict[str, list["Site"]]]]


def places(scan: "ScanResult") -> Places:
    """Sort the sites of a scan by object, function and kind of access, and place."""
    found: defaultdict[str, defaultdict[str, defaultdict[str, list[Site]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for site in scan.sites:
        place = subject_of(site).place
        assert place is not None
        name = "\x1f".join(
            (place.owner or "", place.kind or "", place.access or "", place.accessor or "")
        )
        group = hashlib.blake2b(name.encode(), digest_size=_DIGITS // 2).hexdigest()
        # Without debug information each instruction is a place.
        found[site.object or site.module][group][site.spot or site.id].append(site)
    return {
        where: {group: dict(spots) for group, spots in groups.items()}
        for where, groups in found.items()
    }


def new_places(scan: "ScanResult", before: GateBaseline) -> "list[Site]":
    """List a site of each place that is more than in the baseline: the last ones of their kind.

    Raises BadInputFileError where the baseline makes no sense.
    """
    found: list[Site] = []
    for where, groups in places(scan).items():
        known = _counts(before.places.get(where, ""))
        for group, spots in groups.items():
            more = len(spots) - known.get(group, 0)
            if more > 0:
                # Which of them are new their number does not tell: the last ones in the source.
                last = sorted(spots.values(), key=_line)[-more:]
                found.extend(sites[0] for sites in last)
    return found


def _line(sites: "list[Site]") -> tuple[int, str]:
    first = (sites[0].spot or "").partition(" ")[0].partition(":")[0]
    return (int(first) if first.isdecimal() else 0, sites[0].address)


def _counts(text: str) -> dict[str, int]:
    counts = {}
    for part in text.split():
        group, _, count = part.partition(":")
        if not count.isascii() or not count.isdigit() or len(count) > _DIGITS:
            raise BadInputFileError(f"The baseline has {part!r:.40} where HASH:COUNT should be.")
        counts[group] = int(count)
    return counts


def baseline(scan: "ScanResult", others: "Iterable[ResultDocument]") -> GateBaseline:
    """Make a baseline of a scan, and of what else the gate looks at."""
    lines = {
        where: " ".join(f"{group}:{len(spots)}" for group, spots in sorted(groups.items()))
        for where, groups in sorted(places(scan).items())
    }
    ids = {found.id for document in (scan, *others) for found in findings(document)}
    ids.update(unseen(text) for text in scan.coverage.missing)
    return GateBaseline(
        schema_=BASELINE_SCHEMA,
        version=VERSION,
        kernel=scan.kernel.release or scan.kernel.build_id or "a kernel without a release",
        findings=tuple(sorted(ids)),
        places=lines,
    )


def unseen(text: str) -> str:
    """Name a part of a kernel that could not be seen, as a baseline does."""
    return f"unseen: {text}"


def write(path: "Path", made: GateBaseline) -> None:
    """Write a baseline, a line for each object, so that a commit shows which changed."""
    lines = [
        "# Made by `trapline gate --write-baseline`: what this kernel had already.",
        f"schema = {encode.toml_text(BASELINE_SCHEMA)}",
        f"version = {VERSION}",
        f"kernel = {encode.toml_text(made.kernel)}",
        "findings = [",
        *(f"  {encode.toml_text(one)}," for one in made.findings),
        "]",
        "",
        "[places]",
        *(
            f"{encode.toml_text(where)} = {encode.toml_text(counts)}"
            for where, counts in made.places.items()
        ),
        "",
    ]
    files.write_whole(path, ["\n".join(lines).encode()])


def load(path: "Path") -> GateBaseline:
    """Read a baseline. Raises BadInputFileError."""
    document = decode.toml(files.read(path, limit=_MOST, what="a baseline"), str(path))
    if document.get("schema") != BASELINE_SCHEMA:
        raise BadInputFileError(
            f"{path}: is no baseline of a gate; make one with trapline gate --write-baseline."
        )
    return decode.convert(document, GateBaseline, str(path))
