"""From failing cases to causes: what they share and no passing case has.

Cases are split by class, kind and what differs. Within one instruction form, the feature that
only failing cases have and most of them do is a cause; what is left after it may have others.
A form without a passing case fails as such. Forms that fail of the same cause are one finding.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Final, NamedTuple

from trapline.results.verify import EmulatedClass, Kind
from trapline.verify import features
from trapline.verify.cases import Case
from trapline.verify.differences import Mismatch
from trapline.verify.judge import Judgement

SOMETIMES: Final = "some operands"
# A fault does not show where the wrong value happens to be the right one: the share of passing
# to failing cases up to which a feature counts as the cause, tried in this order.
COINCIDENCES: Final = (0.05, 0.25, 0.5)
# What explains less than this share of the failures is left to chance.
LEAST_SHARE: Final = 0.1


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
    symptoms: dict[tuple[EmulatedClass, Kind, str], dict[tuple[str, ...], list[_Failure]]]
    symptoms = defaultdict(lambda: defaultdict(list))
    for (trap, _), cases in by_form.items():
        for (kind, detail, shared), failures in _of_form(cases):
            symptoms[trap, kind, detail][shared].extend(failures)
    return tuple(
        _cause(*symptom, shared, failures)
        for symptom, groups in symptoms.items()
        for shared, failures in _merged(groups).items()
    )


def _merged(groups: dict[tuple[str, ...], list[_Failure]]) -> dict[tuple[str, ...], list[_Failure]]:
    """Count what was told more exactly of one form than of another to the more general cause."""
    merged: dict[tuple[str, ...], list[_Failure]] = {}
    for shared in sorted(groups, key=lambda words: (SOMETIMES in words, len(words), words)):
        for failure in groups[shared]:
            words = failure.features if SOMETIMES in shared else frozenset(shared)
            general = next((known for known in merged if known and words.issuperset(known)), shared)
            merged.setdefault(general, []).append(failure)
    return merged


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
    least = max(len(failures) * LEAST_SHARE, 1)
    for coincidence in COINCIDENCES:
        for size in range(3):
            while len(left) >= least:
                best = _best(left, passing, size, coincidence, least)
                if best is None:
                    break
                chosen = frozenset(best)
                yield best, [failure for failure in left if chosen <= failure.features]
                left = [failure for failure in left if not chosen <= failure.features]
    if left:
        yield (SOMETIMES,), left


def _best(
    failures: list[_Failure],
    passing: list[frozenset[str]],
    size: int,
    coincidence: float,
    least: float,
) -> tuple[str, ...] | None:
    """Return the features that most failures and hardly a passing case have."""
    counts: dict[tuple[str, ...], int] = defaultdict(int)
    for failure in failures:
        for words in combinations(sorted(failure.features), size):
            counts[words] += 1
    for words, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if count < least:
            break
        chosen = frozenset(words)
        if sum(chosen <= other for other in passing) <= count * coincidence:
            return words
    return None


def _cause(
    trap: EmulatedClass, kind: Kind, detail: str, shared: tuple[str, ...], failures: list[_Failure]
) -> Cause:
    example = min(
        failures,
        key=lambda failure: (
            failure.tried.case.ring3, len(failure.tried.case.code), failure.tried.case[1:],
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
