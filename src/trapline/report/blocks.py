"""What a report is made of, and nothing of how it looks.

A page (`report/pages`) turns a document into blocks; a format (`report/formats`) writes blocks
down. Text is as it is in the document, so a format has to make it safe for where it goes. Columns
(`indent`, `hanging`, `width`) are for formats that have columns; others may set lists and terms
as they like.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Gap:
    """The end of a part, for formats whose parts stand apart by nothing else."""


@dataclass(frozen=True, slots=True)
class Heading:
    """The title of a section (`level` 1), or of what follows in it (2)."""

    text: str
    level: Literal[1, 2] = 2


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Sentences; `hanging` indents all lines but the first by so much more than `indent`."""

    text: str
    indent: int = 0
    hanging: int = 0


@dataclass(frozen=True, slots=True)
class Quote:
    """What somebody else asks or says."""

    text: str


@dataclass(frozen=True, slots=True)
class Item:
    """An item of a list."""

    text: str
    indent: int = 0


@dataclass(frozen=True, slots=True)
class Term:
    """A name and what it stands for; `width` is that of the column of names."""

    name: str
    text: str
    indent: int
    width: int


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a header; a column of numbers goes to the right.

    `right`: so do all columns but the first, as their texts are numbers or stand for one.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str | int, ...], ...]
    right: bool = False


@dataclass(frozen=True, slots=True)
class Matrix:
    """Counts by two things: `groups` maps a title to its named rows, `columns` heads the counts."""

    columns: tuple[str, ...]
    groups: Mapping[str, tuple[tuple[str, tuple[int, ...]], ...]]


@dataclass(frozen=True, slots=True)
class Code:
    """Lines that are not filled: addresses, registers, commands.

    `long` says what becomes of a line that is too long: it stays ("keep"), loses its end ("cut"),
    or goes on below itself ("wrap").
    """

    lines: tuple[str, ...]
    indent: int = 0
    long: Literal["keep", "cut", "wrap"] = "keep"


@dataclass(frozen=True, slots=True)
class Strip:
    """A mark for each place of a line of places; a space where nothing is known.

    `names` says for each place what it belongs to, `words` what a mark means. Stretches of marks
    that are all `quiet` may be told in a sentence unless `whole` is set.
    """

    marks: str
    names: tuple[str, ...]
    words: Mapping[str, str]
    quiet: frozenset[str]
    whole: bool


@dataclass(frozen=True, slots=True)
class Details:
    """Blocks that a reader may want to unfold; `summary` stands for them until then.

    A format that cannot fold shows the blocks alone.
    """

    summary: str
    blocks: "tuple[Block, ...]" = field(default=())
    indent: int = 0


Block = Gap | Heading | Paragraph | Quote | Item | Term | Table | Matrix | Code | Strip | Details
