"""A report as one HTML file that needs nothing else: no network, no other file, no framework.

The text is there without scripts. The lists of the document are data beside it, which a script
turns into a map, filters and a table; what it shows it sets as text, never as markup. A content
security policy allows this page's own style and script by their hashes, and nothing else.
"""

import base64
import html
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from trapline.base import encode, files
from trapline.base.errors import ExitCode
from trapline.base.printable import printable
from trapline.report.blocks import Heading, Paragraph
from trapline.report.formats.page_blocks import elements, escape, tag
from trapline.report.words import counted
from trapline.results.findings import exit_code

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from trapline.report.blocks import Block
    from trapline.results.document import ResultDocument
    from trapline.results.findings import Finding
    from trapline.results.rows import Cell, Row

_SHIPPED: Final = "trapline.report.formats.site"
_SAYING: Final = (Heading, Paragraph)
#: What would end a script element, or open a comment in one, in whatever a kernel calls a function.
_IN_SCRIPT: Final = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028"}


class Column(NamedTuple):
    """What another result says of the rows of a list, by their `id`; `otherwise` of the rest."""

    name: str
    values: "Mapping[str, str]"
    otherwise: str


@dataclass(frozen=True)
class Part:
    """One result on a page: a short title, what its report says, its lists, its findings.

    `columns` are more columns of a list, by its name.
    """

    title: str
    blocks: "tuple[Block, ...]"
    document: "ResultDocument"
    findings: "tuple[Finding, ...]"
    columns: "Mapping[str, Sequence[Column]]" = field(default_factory=dict)

    def with_columns(self, name: str, columns: "Sequence[Column]") -> "Part":
        """Return the part with more columns of a list."""
        return replace(self, columns={**self.columns, name: columns})

    def rows(self, name: str) -> "list[Row]":
        """Return the rows of a list, with all columns."""
        rows = self.document.rows(name)
        for column in self.columns.get(name, ()):
            for row in rows:
                row[column.name] = column.values.get(str(row.get("id")), column.otherwise)
        return rows

    @property
    def headline(self) -> str:
        """The first thing that the report says, which names the kernel."""
        first = next((block for block in self.blocks if isinstance(block, _SAYING)), None)
        return f"trapline {self.title}" if first is None else first.text


def render_page(title: str, parts: "Iterable[Part]") -> "Iterator[bytes]":
    """Yield the page in pieces, UTF-8."""
    for line in _lines(title, tuple(parts)):
        yield line.encode() + b"\n"


def _lines(title: str, parts: tuple[Part, ...]) -> "Iterator[str]":
    style = files.shipped(_SHIPPED, "page.css").decode()
    script = files.shipped(_SHIPPED, "page.js").decode()
    policy = f"default-src 'none'; style-src {_allowed(style)}; script-src {_allowed(script)}"
    yield '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield tag("title", title)
    yield f"<style>{style}</style></head><body>"
    yield f"<header>{tag('h1', title)}"
    yield '<nav aria-label="Results"></nav></header><main>'
    for number, part in enumerate(parts):
        yield from _part(number, part)
    yield "</main>"
    data = [_data(part) for part in parts]
    text = "".join(_IN_SCRIPT.get(c, c) for c in encode.json(data).decode())
    yield f'<script type="application/json" id="data">{text}</script>'
    yield f"<script>{script}</script></body></html>"


def _allowed(text: str) -> str:
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"


def _part(number: int, part: Part) -> "Iterator[str]":
    yield f'<section class="part" id="part{number}" aria-label="{escape(part.title)}">'
    yield from _verdict(part)
    yield f'<div class="explorer" id="explorer{number}"></div>'
    yield '<article class="report">'
    yield from elements(part.blocks)
    yield "</article></section>"


def _verdict(part: Part) -> "Iterator[str]":
    errors = sum(each.level == "error" for each in part.findings)
    notes = len(part.findings) - errors
    said = counted(errors, "finding")
    if notes:
        said += f", {counted(notes, 'note')}"
    code = exit_code(part.document)
    if code > ExitCode.FINDINGS:
        # A guest that died, or a part that was not seen: no findings, and not good.
        # With `boot --run` it is the program's.
        names = (f", {known.name}" for known in ExitCode if known == code)
        said += f"; exit code {code:d}{next(names, '')}"
    kind = "good" if code == ExitCode.CLEAN else "bad"
    yield f'<p class="verdict {kind}">{tag("strong", said)}</p>'


def _data(part: Part) -> dict[str, Any]:
    """Write the lists of a document as numbers: each text stands once, in `texts`."""
    numbers: dict[str, int] = {}
    subjects = {id(each.subject): each for each in part.findings}
    lists = []
    for name in part.document.lists:
        rows = part.rows(name)
        if not rows:
            continue
        marked = _marks(part.document, name, subjects)
        lists.append(
            {
                "name": name,
                "columns": list(rows[0]),
                "rows": [[_number(cell, numbers) for cell in row.values()] for row in rows],
                "found": [[at, _number(text, numbers)] for at, text in marked],
            }
        )
    return {
        "title": part.title,
        "texts": list(numbers),
        "lists": lists,
        "findings": len(part.findings),
    }


def _marks(
    document: "ResultDocument", name: str, subjects: "dict[int, Finding]"
) -> "Iterator[tuple[int, str]]":
    """Yield the rows of a list that are findings, and what is wrong with each."""
    held = getattr(document, name)
    for at, each in enumerate(held):
        found = subjects.get(id(each))
        if found is not None:
            yield at, found.text


def _number(cell: "Cell", numbers: dict[str, int]) -> "int | list[Cell]":
    """Give a text's place among the texts; any other value by itself, in a list of one."""
    if isinstance(cell, str):
        text = printable(cell)
        return numbers.setdefault(text, len(numbers))
    return [cell]
