"""The result documents of `trapline rules`: rules shown, explained and compared."""

from typing import TYPE_CHECKING, ClassVar, Final, Literal

from trapline.results.document import Document, ResultDocument
from trapline.results.rows import Row, flat

if TYPE_CHECKING:
    from collections.abc import Iterable

SHOW_SCHEMA: Final = "trapline/rules"
EXPLAIN_SCHEMA: Final = "trapline/rules-explained"
DIFF_SCHEMA: Final = "trapline/rules-diff"
LINT_SCHEMA: Final = "trapline/rules-linted"
VERSION: Final = 1

#: A cell: numbers are numbers, yes/no is a boolean, an empty number is null.
Cell = str | int | bool | None


class RuleRow(Document, frozen=True, kw_only=True):
    """One row of a table; `columns` are those that other tables do not have.

    `module` is the version in which it was read. `followed`: held for true; `enforced`: the
    software TD takes its answer from this row, which it does not from others that are followed.
    """

    id: str
    claimant: str
    source: str
    module: str
    followed: bool
    enforced: bool
    note: str
    columns: dict[str, Cell]


class RuleTable(Document, frozen=True, kw_only=True):
    """One table; `key` names the columns that make up the question a row answers."""

    name: str
    key: tuple[str, ...]
    rows: tuple[RuleRow, ...]


class RulesShown(ResultDocument, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """What `trapline rules show` prints."""

    lists: ClassVar = ("tables",)

    schema_: Literal["trapline/rules"] = SHOW_SCHEMA
    version: Literal[1] = VERSION
    module_version: str
    tables: tuple[RuleTable, ...]

    def parts(self, name: str) -> list[Row]:
        """Return a row for each rule, of all tables; the columns are those of all of them."""
        del name  # there is but one list
        return _even(
            {"table": table.name, **_rule(row)} for table in self.tables for row in table.rows
        )


class RuleAnswer(Document, frozen=True, kw_only=True):
    """One answer to a question; `agrees`: with the one that the software TD follows."""

    row: RuleRow
    agrees: bool


class RuleQuestion(Document, frozen=True, kw_only=True):
    """One question with all answers that are known, the followed one first.

    `linux` is what Linux does with the #VE that it comes to: rows of the table `linux`.
    """

    table: str
    title: str
    answers: tuple[RuleAnswer, ...]
    linux: tuple[RuleRow, ...]

    @property
    def is_disputed(self) -> bool:
        """Whether some source says something else than what is followed."""
        return not all(answer.agrees for answer in self.answers)


class RulesExplained(ResultDocument, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """What `trapline rules explain` prints."""

    lists: ClassVar = ("questions",)

    schema_: Literal["trapline/rules-explained"] = EXPLAIN_SCHEMA
    version: Literal[1] = VERSION
    module_version: str
    subject: str
    questions: tuple[RuleQuestion, ...]

    def parts(self, name: str) -> list[Row]:
        """Return a row for each answer to each question."""
        del name  # there is but one list
        return _even(
            {
                "table": question.table,
                "title": question.title,
                "agrees": answer.agrees,
                **_rule(answer.row),
            }
            for question in self.questions
            for answer in question.answers
        )


class ColumnChange(Document, frozen=True, kw_only=True):
    """One cell before and after; absent on one side for a row that is only on the other."""

    column: str
    old: Cell
    new: Cell


class RuleChange(Document, frozen=True, kw_only=True):
    """A row that is not the same on both sides, with the row on each; `title` is its question.

    `answers`: what it answers differs, not only who says so and what is noted.
    """

    table: str
    id: str
    title: str
    change: Literal["added", "removed", "changed"]
    answers: bool
    old: RuleRow | None
    new: RuleRow | None
    columns: tuple[ColumnChange, ...]


class RulesCompared(ResultDocument, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """What `trapline rules diff` prints."""

    lists: ClassVar = ("changes",)

    schema_: Literal["trapline/rules-diff"] = DIFF_SCHEMA
    version: Literal[1] = VERSION
    old: str
    new: str
    changes: tuple[RuleChange, ...]

    def parts(self, name: str) -> list[Row]:
        """Return a row for each cell that differs."""
        del name  # there is but one list
        return [
            {
                "table": row.table,
                "id": row.id,
                "title": row.title,
                "change": row.change,
                **flat(cell),
            }
            for row in self.changes
            for cell in row.columns
        ]


class RuleProblem(Document, frozen=True, kw_only=True):
    """Something wrong with a table; `line` counts from 1, the header being line 1."""

    table: str
    line: int
    text: str


class RulesLinted(ResultDocument, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """What `trapline rules lint` prints; `subject` is what was read."""

    lists: ClassVar = ("problems",)

    schema_: Literal["trapline/rules-linted"] = LINT_SCHEMA
    version: Literal[1] = VERSION
    subject: str
    problems: tuple[RuleProblem, ...]


def _rule(row: RuleRow) -> Row:
    """Return a rule as a row; its own columns stand where those of all tables end."""
    common = {name: value for name, value in flat(row).items() if name != "columns"}
    return common | row.columns


def _even(rows: "Iterable[Row]") -> list[Row]:
    """Give all rows the same keys."""
    found = list(rows)
    keys = dict.fromkeys(key for row in found for key in row)
    return [{key: row.get(key) for key in keys} for row in found]
