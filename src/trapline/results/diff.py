"""The result document of `trapline diff`: schema "trapline/diff"."""

from typing import ClassVar, Final, Literal

from trapline.results.document import Document, ResultDocument
from trapline.results.labels import Labelled

SCHEMA: Final = "trapline/diff"
VERSION: Final = 1

#: "new" and "gone" are changes of the source; "moved" is the same under another id, "changed" has
#: another verdict; "copied" and "merged" are what the compiler made of one place of the source,
#: "inlined" and "outlined" what it made of one inline function.
ChangeKind = Literal["new", "gone", "changed", "moved", "copied", "merged", "inlined", "outlined"]
#: Those that the compiler is the author of.
COMPILED: Final[frozenset[ChangeKind]] = frozenset({"copied", "merged", "inlined", "outlined"})


class Side(Document, frozen=True, kw_only=True):
    """One of the two that were compared. `parts` is how many parts of it were."""

    name: str
    release: str | None
    build_id: str | None
    generator: str
    complete: bool
    parts: int


class Change(Document, frozen=True, kw_only=True):
    """One difference.

    `part` says of what: "site", "mapping", "driver", or the kind of finding. `id` is that in the
    new document, of what is gone that in the old one; `old_id` is there where it was another.
    `where` is function and source line, `what` a phrase, `why` the two verdicts or by what two
    places were taken for one. `error` is whether it goes against the policy: it is new, or its
    verdict became one that does, and no label settles it.
    """

    change: ChangeKind
    part: str
    id: str
    old_id: str | None
    driver: str | None
    subsystem: str | None
    where: str
    what: str
    why: str
    error: bool
    label: Labelled | None = None


class DiffResult(ResultDocument, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """What is different between two results of one command.

    `of` is the schema of both. `same` counts the parts with the same id and verdict, `counts` the
    changes of each kind.
    """

    lists: ClassVar = ("changes",)

    schema_: Literal["trapline/diff"] = SCHEMA
    version: Literal[1] = VERSION
    generator: str
    of: str
    old: Side
    new: Side
    same: int
    counts: dict[str, int]
    changes: tuple[Change, ...]
