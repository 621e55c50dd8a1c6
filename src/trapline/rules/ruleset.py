"""The rules of one module version, and the one way to ask them.

Whoever models something asks for the row that decides it, once, when it is built:

    row = rules.ask(InstructionRule, "HLT", "cpl_0")

and turns the row's answer into what it does then. What was asked is remembered in `asked`, so
that it can be told which rows are enforced.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trapline.base.errors import BadInputFileError
from trapline.rules.rows import (
    AttributeRule,
    CpuidRule,
    FieldRule,
    InstructionRule,
    LinuxRule,
    MemoryRule,
    MsrRule,
    NestingRule,
    Outcome,
    Rule,
    Standing,
    StatusRule,
    TdcallRule,
    TdvmcallRule,
)

TABLES: dict[str, type[Rule]] = {
    "instructions": InstructionRule,
    "msrs": MsrRule,
    "cpuid": CpuidRule,
    "memory": MemoryRule,
    "tdcalls": TdcallRule,
    "tdvmcalls": TdvmcallRule,
    "statuses": StatusRule,
    "nesting": NestingRule,
    "attributes": AttributeRule,
    "fields": FieldRule,
    "linux": LinuxRule,
}
_TABLE_OF = {kind: name for name, kind in TABLES.items()}

R = TypeVar("R", bound=Rule)
T = TypeVar("T")


@dataclass(frozen=True)
class RuleSet:
    """All tables of one module version, rows in the order of the files.

    `asked` has the table and id of each row that was asked for since this set was made.
    """

    version: str
    instructions: tuple[InstructionRule, ...]
    msrs: tuple[MsrRule, ...]
    cpuid: tuple[CpuidRule, ...]
    memory: tuple[MemoryRule, ...]
    tdcalls: tuple[TdcallRule, ...]
    tdvmcalls: tuple[TdvmcallRule, ...]
    statuses: tuple[StatusRule, ...]
    nesting: tuple[NestingRule, ...]
    attributes: tuple[AttributeRule, ...]
    fields: tuple[FieldRule, ...]
    linux: tuple[LinuxRule, ...]
    asked: set[tuple[str, str]] = field(init=False, repr=False, compare=False)
    _answers: dict[tuple[object, ...], Rule] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        answers: dict[tuple[object, ...], Rule] = {}
        for kind, name in _TABLE_OF.items():
            for row in self.table(name):
                if row.followed:
                    answers[kind, *row.key] = row
        object.__setattr__(self, "asked", set())
        object.__setattr__(self, "_answers", answers)

    def table(self, name: str) -> tuple[Rule, ...]:
        """Return the rows of the table called `name`."""
        rows: tuple[Rule, ...] = getattr(self, name)
        return rows

    # Asking.

    def ask(self, kind: type[R], *key: object) -> R:
        """Return the row that answers a question: `key` is what `kind.KEY` names.

        Raises BadInputFileError where no row does.
        """
        row = self._answers.get((kind, *key))
        if row is None:
            words = ", ".join("any" if part is None else str(part) for part in key)
            raise BadInputFileError(
                f"{_TABLE_OF[kind]}.csv: no row answers for {words}, which the software TD asks; "
                "add one."
            )
        self.asked.add((_TABLE_OF[kind], row.id))
        assert isinstance(row, kind)
        return row

    def find(self, kind: type[R], *key: object) -> R | None:
        """Return the row that answers a question that not every module knows, or None."""
        return self.ask(kind, *key) if (kind, *key) in self._answers else None

    def each(self, kind: type[R]) -> Iterator[R]:
        """Yield every row of a table that is not only claimed."""
        name = _TABLE_OF[kind]
        for row in self.table(name):
            if row.followed:
                self.asked.add((name, row.id))
                assert isinstance(row, kind)
                yield row

    def status(self, name: str, operand: str = "") -> int:
        """Return the value of a completion code or TDVMCALL status, with an operand number."""
        kind = "ghci" if name.startswith("TDVMCALL_") else "completion"
        value = self.ask(StatusRule, kind, name).value
        return value | (self.operand(operand) if operand else 0)

    def operand(self, name: str) -> int:
        """Return the number that completion codes have for an operand."""
        return self.ask(StatusRule, "operand", name).value

    def mask(self, kind: str, *names: str) -> int:
        """Return the bits that a register or field has for these names."""
        return sum(1 << self.ask(AttributeRule, kind, name).bit for name in names)

    def mask_if_known(self, kind: str, name: str) -> int:
        """Return the bit of a name that only newer modules know; 0 where it is not enforced."""
        row = self._answers.get((AttributeRule, kind, name))
        known = row is not None and row.standing is Standing.ENFORCED
        return self.mask(kind, name) if known else 0


def choose(row: Rule, can: Mapping[Any, T]) -> T:
    """Return what `can` has for the outcome of `row`; BadInputFileError if that is nothing."""
    outcome = getattr(row, "outcome", None)
    assert isinstance(outcome, Outcome)
    if outcome not in can:
        known = " or ".join(repr(str(each)) for each in can)
        raise BadInputFileError(
            f"{_TABLE_OF[type(row)]}.csv: {row.id} says {str(outcome)!r}, which the software TD "
            f"cannot do there; say {known}."
        )
    return can[outcome]
