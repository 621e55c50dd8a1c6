"""What people said of findings: the file that they say it in, and what documents hold of it.

    schema = "trapline/labels"
    version = 1

    [[label]]
    label = "safe"
    reason = "the value is only printed"
    owner = "ada@example.org"
    date = 2026-11-28
    id = "5d0c1f0a2b3c4d5e"

`trapline.labels` reads it, decides which entry a finding has, and carries it from kernel to kernel.
"""

import datetime as dt
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec

from trapline.results.document import Document, ResultDocument
from trapline.results.trapclass import TrapClass

SCHEMA: Final = "trapline/labels"
VERSION: Final = 1
MOST: Final = 65_536  # entries

Label = Literal["excluded", "unclassified", "wrapper", "trusted", "safe", "concern"]
#: Labels that say a finding is all right.
SETTLED: Final[frozenset[Label]] = frozenset({"excluded", "wrapper", "trusted", "safe"})

_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
_Pattern = Annotated[str, msgspec.Meta(min_length=1, max_length=300)]


class KnownPlace(Document, frozen=True, kw_only=True, omit_defaults=True):
    """What was known of the finding that an entry's id names: the next kernel's is matched by it.

    The fields are those of `trapline.results.scan.Site`; `kind` is the class of trap or "mapping",
    `access` direction and width.
    """

    kind: str | None = None
    object: str | None = None
    owner: str | None = None
    spot: str | None = None
    landed: str | None = None
    accessor: str | None = None
    access: str | None = None
    driver: str | None = None


class LabelEntry(Document, frozen=True, kw_only=True, omit_defaults=True, rename={"trap": "class"}):
    """One `[[label]]` table: what is said, by whom, and of which findings.

    A finding has the label if it fits all of `id`, `function`, `file`, `driver`, `subsystem`,
    `class` and `gate` that are given; of those there must be one. All but `id` and `class` may
    hold the patterns of a shell: `drivers/pci/*`. `kernel` is the release that `id` was seen in
    and `place` what was known of it; `carried` says that the entry was made for a newer kernel by
    likeness, and does not count until a person takes the line out.
    """

    label: Label
    reason: Annotated[_Text, msgspec.Meta(description="why, in a sentence")]
    owner: Annotated[_Text, msgspec.Meta(description="who says so")]
    date: Annotated[dt.date, msgspec.Meta(description="since when")]
    id: _Pattern | None = None
    function: _Pattern | None = None
    file: _Pattern | None = None
    driver: _Pattern | None = None
    subsystem: _Pattern | None = None
    trap: TrapClass | None = None
    gate: _Pattern | None = None
    kernel: _Pattern | None = None
    carried: _Pattern | None = None
    place: KnownPlace | None = None


class LabelFile(Document, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """A whole file."""

    schema_: Literal["trapline/labels"]
    version: Literal[1]
    label: Annotated[tuple[LabelEntry, ...], msgspec.Meta(max_length=MOST)] = ()


class Labelled(Document, frozen=True, kw_only=True):
    """One finding or site of a document that has a label: `id` is its own, `entry` counts from 1.

    `carried` says by what likeness an entry came here that no person has confirmed.
    """

    id: str
    label: Label
    reason: str
    owner: str
    date: str
    entry: int
    carried: str | None = None

    @property
    def settles(self) -> bool:
        """Whether a person said that the finding is all right."""
        return self.label in SETTLED and self.carried is None


class ListedLabel(Document, frozen=True, kw_only=True):
    """One entry of a file; `of` says in words what it fits, `fits` how many of a document.

    `fits` is None where there was no document to count in.
    """

    entry: int
    label: Label
    of: str
    reason: str
    owner: str
    date: str
    carried: str | None
    fits: int | None


class LabelList(ResultDocument, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """A file of labels, held against a result document where one was given.

    `unlabelled` counts the findings of `document` that go against the policy and have no label
    that settles them; None without a document.
    """

    lists: ClassVar = ("labels",)

    schema_: Literal["trapline/label-list"] = "trapline/label-list"
    version: Literal[1] = 1
    generator: str
    file: str
    document: str | None
    unlabelled: int | None
    labels: tuple[ListedLabel, ...]


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a file of labels."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "trapline labels",
        **msgspec.json.schema(LabelFile),
    }
