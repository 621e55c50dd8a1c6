"""The result documents of `trapline rules`: rules shown, explained and compared."""

from typing import Final, Literal

from trapline.results.document import Document

SHOW_SCHEMA: Final = "trapline/rules"
EXPLAIN_SCHEMA: Final = "trapline/rules-explained"
DIFF_SCHEMA: Final = "trapline/rules-diff"
VERSION: Final = 1

#: A cell: numbers are numbers, yes/no is a boolean, an empty number is null.
Cell = str | int | bool | None


class RuleRow(Document, frozen=True, kw_only=True):
    """One row of a table; `columns` are those that other tables do not have."""

    id: str
    claimant: str
    source: str
    followed: bool
    note: str
    columns: dict[str, Cell]


class RuleTable(Document, frozen=True, kw_only=True):
    """One table; `key` names the columns that make up the question a row answers."""

    name: str
    key: tuple[str, ...]
    rows: tuple[RuleRow, ...]


class RulesShown(Document, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """What `trapline rules show` prints."""

    schema_: Literal["trapline/rules"] = SHOW_SCHEMA
    version: Literal[1] = VERSION
    module_version: str
    tables: tuple[RuleTable, ...]


class RuleAnswer(Document, frozen=True, kw_only=True):
    """One answer to a question; `agrees`: with the one that the software TD follows."""

    row: RuleRow
    agrees: bool


class RuleQuestion(Document, frozen=True, kw_only=True):
    """One question with all answers that are known, the followed one first."""

    table: str
    title: str
    answers: tuple[RuleAnswer, ...]

    @property
    def is_disputed(self) -> bool:
        """Whether some source says something else than what is followed."""
        return not all(answer.agrees for answer in self.answers)


class RulesExplained(Document, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """What `trapline rules explain` prints."""

    schema_: Literal["trapline/rules-explained"] = EXPLAIN_SCHEMA
    version: Literal[1] = VERSION
    module_version: str
    subject: str
    questions: tuple[RuleQuestion, ...]


class ColumnChange(Document, frozen=True, kw_only=True):
    """One cell before and after; absent on one side for a row that is only on the other."""

    column: str
    old: Cell
    new: Cell


class RuleChange(Document, frozen=True, kw_only=True):
    """A row that is not the same on both sides."""

    table: str
    id: str
    change: Literal["added", "removed", "changed"]
    columns: tuple[ColumnChange, ...]


class RulesCompared(Document, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """What `trapline rules diff` prints."""

    schema_: Literal["trapline/rules-diff"] = DIFF_SCHEMA
    version: Literal[1] = VERSION
    old: str
    new: str
    changes: tuple[RuleChange, ...]
