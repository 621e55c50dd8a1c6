"""The completion codes of TDCALL leaves, case by case, by the table `tdcalls`."""

from typing import TYPE_CHECKING, Final

from trapline.base.errors import BadInputFileError
from trapline.rules.rows import TdcallRule

if TYPE_CHECKING:
    from trapline.rules.ruleset import RuleSet

# What a case may end with besides a completion code in RAX.
RAISE_GP: Final = -1
TD_EXIT: Final = -2


class Completions:
    """What RAX is after a leaf, in each case that the table has."""

    def __init__(self, rules: "RuleSet") -> None:
        self._rules = rules

    def of(self, leaf: int | None, case: str, *, may_exit: bool = False) -> int:
        """Return the completion code, RAISE_GP, or TD_EXIT where the leaf can (`may_exit`)."""
        row = self._rules.ask(TdcallRule, leaf, case)
        if row.status == "gp":
            return RAISE_GP
        if row.status == "td_exit":
            if may_exit:
                return TD_EXIT
            raise BadInputFileError(
                f"tdcalls.csv: {row.id} says 'td_exit', which the software TD cannot do there; "
                "name a completion code."
            )
        return self._rules.status(row.status, row.operand)
