"""From failing cases to causes: what they share and no passing case has.

Cases are split by class, kind and what differs. Within one instruction form, the feature that
only failing cases have and most of them do is a cause; what is left after it may have others.
A form without a passing case fails as such. Forms that fail of the same cause are one finding.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Final, NamedTuple

from trapline.explore.verify import features
from trapline.explore.verify.cases import Case
from trapline.explore.verify.judge import Judgement, Mismatch
from trapline.model.verify import EmulatedClass, Kind

SOMETIMES: Final = "some operands"
# A fault may not show where the wrong value happens to be the right one: the share of passing
# to failing cases up to which a feature still counts as the cause.
COINCIDENCE: Final = 0.25


class Tried(NamedTuple):
    """A case and what came of it; `form` is iced's number of the form, `name` the manual's."""

    case: Case
    form: int
    name: str
    judgement: Judgement


class Cause(NamedTuple):
    """One group: `features` are what all its cases share. `example` is the smallest."""

    trap: EmulatedClass
    kind: Kind
    detail: str
    features: tuple[str, ...]
    forms: tuple[int, ...]
    names: tuple[str, ...]
    example: Case
    mismatch: Mismatch
    cases: int


class _Failure(NamedTuple):
    tried: Tried
    mismatch: Mismatch
    features: frozenset[str]


def find_causes(tried: Sequence[Tried]) -> tuple[Cause, ...]:
    """Group all mismatches."""
    by_form: dict[tuple[EmulatedClass, int], list[Tried]] = defaultdict(list)
    for each in tried:
        if each.judgement.handled or each.judgement.mismatches:
            by_form[each.case.trap, each.form].append(each)
    groups: dict[tuple[EmulatedClass, Kind, str, tuple[str, ...]], list[_Failure]] = defaultdict(
        list
    )
    for (trap, _), cases in by_form.items():
        for (kind, detail, shared), failures in _of_form(cases):
            groups[trap, kind, detail, shared].extend(failures)
    return tuple(_cause(*key, failures) for key, failures in groups.items())


def _of_form(
    cases: list[Tried],
) -> Iterable[tuple[tuple[Kind, str, tuple[str, ...]], list[_Failure]]]:
    """Split the failures of one form by cause."""
    known = [(each, features.of_case(each.case)) for each in cases]
    symptoms: dict[tuple[Kind, str], list[_Failure]] = defaultdict(list)
    for each, words in known:
        for mismatch in each.judgement.mismatches:
            symptoms[mismatch.kind, mismatch.detail].append(_Failure(each, mismatch, words))
    for (kind, detail), failures in symptoms.items():
        failing = {id(failure.tried) for failure in failures}
        compared = any(failure.tried.judgement.compared for failure in failures)
        passing = [
            words
            for each, words in known
            if id(each) not in failing and (each.judgement.compared or not compared)
        ]
        for shared, part in _explain(failures, passing):
            yield (kind, detail, shared), part


def _explain(
    failures: list[_Failure], passing: list[frozenset[str]]
) -> Iterable[tuple[tuple[str, ...], list[_Failure]]]:
    """Cover the failures by as few features as tell them from the passing cases."""
    left = failures
    for size in range(3):
        while left:
            best = _best(left, passing, size)
            if best is None:
                break
            chosen = frozenset(best)
            yield best, [failure for failure in left if chosen <= failure.features]
            left = [failure for failure in left if not chosen <= failure.features]
    if left:
        yield (SOMETIMES,), left


def _best(
    failures: list[_Failure], passing: list[frozenset[str]], size: int
) -> tuple[str, ...] | None:
    """Return the features that most failures and hardly a passing case have."""
    counts: dict[tuple[str, ...], int] = defaultdict(int)
    for failure in failures:
        for words in combinations(sorted(failure.features), size):
            counts[words] += 1
    for words, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        chosen = frozenset(words)
        if sum(chosen <= other for other in passing) <= count * COINCIDENCE:
            return words
    return None


def _cause(
    trap: EmulatedClass, kind: Kind, detail: str, shared: tuple[str, ...], failures: list[_Failure]
) -> Cause:
    example = min(
        failures,
        key=lambda failure: (
            len(failure.tried.case.code), failure.tried.case.code, failure.tried.case[2:],
        ),
    )  # fmt: skip
    forms = {failure.tried.form: failure.tried.name for failure in failures}
    return Cause(
        trap,
        kind,
        detail,
        shared,
        tuple(sorted(forms)),
        tuple(sorted(set(forms.values()))),
        example.tried.case,
        example.mismatch,
        len({id(failure.tried) for failure in failures}),
    )
