"""From failing cases to causes: what they share and no passing case has.

Cases are split by class, kind and what differs. Within one instruction form, the feature that
only failing cases have and most of them do is a cause; what is left after it may have others.
A form without a passing case fails as such. Forms that fail of the same cause are one finding.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Final, NamedTuple

from trapline.results.trapclass import EmulatedClass
from trapline.results.verify import Kind
from trapline.verify import features
from trapline.verify.cases import Case
from trapline.verify.differences import (
    ABOVE,
    EXTENSION,
    HOSTS_ANSWER,
    OTHER,
    SOURCE,
    Mismatch,
    symptom,
)
from trapline.verify.judge import Judgement

SOMETIMES: Final = "some operands"
# A fault does not show where the wrong value happens to be the right one: the share of passing
# to failing cases up to which a feature counts as the cause, tried in this order.
COINCIDENCES: Final = (0.05, 0.25, 0.5)
# What explains less than this share of the failures is left to chance.
LEAST_SHARE: Final = 0.1
# Of all pairs of features, some one is had by a few failures and no passing case by chance.
LEAST_FOR_PAIRS: Final = 4
# More causes than this in one form are taken for one fault, unless chance is ruled out.
MOST_CAUSES: Final = 2
CHANCE: Final = 1e-4
# Different looks of one wrong part of a register.
_REGISTER: Final = frozenset(("wrong-register", "stale-bits", "from-host"))
_WORSE: Final = "wrong-memory"
# A call that should not have been made.
_NEEDLESS: Final = ("from-host", HOSTS_ANSWER)


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


class _Known(NamedTuple):
    """A case with what can be said of it, which is found out once."""

    tried: Tried
    features: frozenset[str]


class _Failure(NamedTuple):
    tried: Tried
    mismatch: Mismatch
    features: frozenset[str]


_Symptom = tuple[EmulatedClass, Kind, str]  # the last is the detail
# Features -> what fails by them.
_Symptoms = dict[_Symptom, dict[tuple[str, ...], list[_Failure]]]


def find_causes(tried: Sequence[Tried]) -> tuple[Cause, ...]:
    """Group all mismatches."""
    by_form: dict[tuple[EmulatedClass, int], list[_Known]] = defaultdict(list)
    for each in tried:
        if each.judgement.handled or each.judgement.mismatches:
            words = features.of_case(each.case, each.judgement.value, each.judgement.address)
            by_form[each.case.trap, each.form].append(_Known(each, words))
    failures = {key: _failures(cases) for key, cases in by_form.items()}
    common: dict[_Symptom, Counter[str]] = defaultdict(Counter)
    told_apart: list[tuple[_Symptom, list[_Failure], list[frozenset[str]]]] = []
    for (trap, form), of_form in failures.items():
        for (kind, detail), group in of_form.items():
            passing = _passing(by_form[trap, form], kind, detail, group)
            told_apart.append(((trap, kind, detail), group, passing))
            balance = common[trap, kind, detail]
            balance.update(word for each in group for word in each.features)
            balance.subtract(word for each in passing for word in each)
    symptoms: _Symptoms = defaultdict(lambda: defaultdict(list))
    for key, group, passing in told_apart:
        for shared, part in _explain(group, passing, common[key]):
            symptoms[key][shared].extend(part)
    _adopt(symptoms)
    groups = {
        (*symptom, shared): failures
        for symptom, groups in symptoms.items()
        for shared, failures in _merged(groups).items()
    }
    told = {key: failures for key, failures in groups.items() if not _follows(key, groups)}
    return tuple(_cause(*key, failures) for key, failures in _joined(told).items())


_Key = tuple[EmulatedClass, Kind, str, tuple[str, ...]]


def _joined(groups: dict[_Key, list[_Failure]]) -> dict[_Key, list[_Failure]]:
    """Make one of what has the same cause and shows in memory here and in a register there.

    A wrong place shows in memory where it is stored to, and in a register where it is loaded from.
    Two parts that are wrong in the same case are two faults.
    """
    joined = dict(groups)
    for key, failures in groups.items():
        trap, kind, detail, shared = key
        home = (trap, _WORSE, SOURCE, shared)
        if (
            kind == "wrong-register"
            and detail in {SOURCE, OTHER}
            and shared
            and SOMETIMES not in shared
            and home in joined
            and {id(each.tried) for each in failures}.isdisjoint(
                id(each.tried) for each in joined[home]
            )
        ):
            joined[home] = joined[home] + joined.pop(key)
    return joined


def _follows(key: _Key, groups: dict[_Key, list[_Failure]]) -> bool:
    """Whether what is above the destination is only ever wrong with the extension below it."""
    trap, kind, detail, shared = key
    below = groups.get((trap, kind, EXTENSION, shared), [])
    if detail != ABOVE or not below:
        return False
    return {id(each.tried) for each in groups[key]} <= {id(each.tried) for each in below}


def _adopt(symptoms: _Symptoms) -> None:
    """Count what is unexplained to a cause by which the same form fails in another way.

    A value that is written to the wrong register does not show there where the register happened
    to hold it.
    """
    for (trap, kind, detail), groups in symptoms.items():
        if kind not in _REGISTER:
            continue
        siblings = [
            (other_detail, shared, failures)
            for (other, other_kind, other_detail), others in symptoms.items()
            if other == trap and other_kind in _REGISTER and others is not groups
            for shared, failures in others.items()
        ]
        known = [(words, each) for _, words, each in siblings if words and SOMETIMES not in words]
        elsewhere = [(words, each) for name, words, each in siblings if name == OTHER]
        for shared in list(groups):
            if shared == (SOMETIMES,):
                homes = known
            elif detail == SOURCE:  # what went to another register is missing where it belongs
                homes = elsewhere
            else:
                continue
            left = _without_home(groups.pop(shared), homes)
            if left:
                groups[shared] = left


def _without_home(
    failures: list[_Failure], siblings: list[tuple[tuple[str, ...], list[_Failure]]]
) -> list[_Failure]:
    """Give each failure to a cause by which its form fails, too; returns those that have none."""
    left: list[_Failure] = []
    for failure in failures:
        home = (known for shared, known in siblings if _is_home(failure, shared, known))
        next(home, left).append(failure)
    return left


def _is_home(failure: _Failure, shared: tuple[str, ...], failures: list[_Failure]) -> bool:
    forms = {each.tried.form for each in failures}
    return failure.tried.form in forms and failure.features.issuperset(shared)


def _merged(groups: dict[tuple[str, ...], list[_Failure]]) -> dict[tuple[str, ...], list[_Failure]]:
    """Count what was told more exactly of one form than of another to the more general cause."""
    merged: dict[tuple[str, ...], list[_Failure]] = {}
    for shared in sorted(groups, key=lambda words: (SOMETIMES in words, len(words), words)):
        for failure in groups[shared]:
            words = failure.features if SOMETIMES in shared else frozenset(shared)
            general = next((known for known in merged if known and words.issuperset(known)), shared)
            merged.setdefault(general, []).append(failure)
    return merged


def _failures(cases: list[_Known]) -> dict[tuple[Kind, str], list[_Failure]]:
    """Sort the failures of one form by what is wrong."""
    found: dict[tuple[Kind, str], list[_Failure]] = defaultdict(list)
    for each, words in cases:
        for mismatch in each.judgement.mismatches:
            found[symptom(mismatch)].append(_Failure(each, mismatch, words))
    return found


def _passing(
    cases: list[_Known], kind: Kind, detail: str, failures: list[_Failure]
) -> list[frozenset[str]]:
    """Return what can be said of each case of a form that does not fail like this.

    What is wrong in another way with the same part is no proof that this part is right; nor is a
    wrong access, behind which nothing else is looked at. A needless call is looked for first.
    """
    compared = any(failure.tried.judgement.compared for failure in failures)
    # Behind these, no other part is looked at.
    hidden = set() if (kind, detail) == _NEEDLESS else {detail, SOURCE, OTHER}
    return [
        words
        for each, words in cases
        if (each.judgement.compared or not compared)
        and not any(
            symptom(mismatch) == (kind, detail)
            or (kind in _REGISTER and mismatch.kind in _REGISTER and mismatch.detail in hidden)
            or (mismatch.kind == "wrong-access" and kind != "wrong-access")
            or symptom(mismatch) == _NEEDLESS
            for mismatch in each.judgement.mismatches
        )
    ]


def _explain(
    failures: list[_Failure], passing: list[frozenset[str]], common: Counter[str]
) -> Iterable[tuple[tuple[str, ...], list[_Failure]]]:
    """Cover the failures by as few features as tell them from the passing cases.

    Features are named only if they explain all failures, or what they explain is no chance. So a
    fault of values, which some prefix or register always happens to have, stays one finding.
    """
    cover, left = _cover(failures, passing, common)
    if left or len(cover) > MOST_CAUSES:
        for words, part in list(cover.items()):
            others = [failure for failure in failures if not failure.features.issuperset(words)]
            if words and _chance(words, part, others, passing) > CHANCE:
                del cover[words]
                left += part
    yield from cover.items()
    if left:
        yield (SOMETIMES,), left


def _cover(
    failures: list[_Failure], passing: list[frozenset[str]], common: Counter[str]
) -> tuple[dict[tuple[str, ...], list[_Failure]], list[_Failure]]:
    """Choose features that explain all, else greedily; returns what each explains, and the rest."""
    sizes = range(3 if len(failures) >= LEAST_FOR_PAIRS else 2)
    for size in sizes:
        whole = (COINCIDENCES[0], len(failures))
        if (best := _best(failures, passing, common, size, whole)) is not None:
            return {best: failures}, []
    left = failures
    least = max(len(failures) * LEAST_SHARE, 1)
    cover: dict[tuple[str, ...], list[_Failure]] = {}
    for coincidence in COINCIDENCES:
        for size in sizes:
            while len(left) >= least:
                best = _best(left, passing, common, size, (coincidence, least))
                if best is None:
                    break
                chosen = frozenset(best)
                cover[best] = [failure for failure in left if chosen <= failure.features]
                left = [failure for failure in left if not chosen <= failure.features]
    return cover, left


def _chance(
    words: tuple[str, ...],
    part: list[_Failure],
    others: list[_Failure],
    passing: list[frozenset[str]],
) -> float:
    """How likely so many cases with these features fail if they fail as often as the others."""
    passed = sum(each.issuperset(words) for each in passing)
    rest = len(others) + len(passing) - passed
    rate = len(others) / rest if rest else 0.0
    return float(rate ** len(part)) if passed < len(part) else 1.0


def _best(
    failures: list[_Failure],
    passing: list[frozenset[str]],
    common: Counter[str],
    size: int,
    bounds: tuple[float, float],
) -> tuple[str, ...] | None:
    """Return the features that most failures and hardly a passing case have.

    Of several that explain as much, the one that passing cases have least, then the more general
    one, then the one that fails most and passes least with all forms (`common`, the difference).
    `bounds` are the share of passing cases that is put down to coincidence, and the least number
    of failures.
    """
    coincidence, least = bounds
    counts: dict[tuple[str, ...], int] = defaultdict(int)
    for failure in failures:
        for words in combinations(sorted(failure.features), size):
            counts[words] += 1
    found: list[tuple[int, int, bool, int, tuple[str, ...]]] = []
    for words, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if count < least or (found and -found[0][0] != count):
            break
        passed = sum(other.issuperset(words) for other in passing)
        if passed <= count * coincidence:
            single = any(map(features.is_single, words))
            spread = min((common[word] for word in words), default=0)
            found.append((-count, passed, single, -spread, words))
    return min(found)[4] if found else None


def _cause(
    trap: EmulatedClass, kind: Kind, detail: str, shared: tuple[str, ...], failures: list[_Failure]
) -> Cause:
    example = min(
        failures,
        key=lambda failure: (
            failure.mismatch.kind != kind, failure.mismatch.detail != detail,
            failure.tried.case.ring3,
            len(failure.tried.case.code), failure.tried.case[1:],
        ),
    )  # fmt: skip
    kinds = {failure.mismatch.kind for failure in failures}
    forms = {failure.tried.form: failure.tried.name for failure in failures}
    return Cause(
        trap,
        kinds.pop() if len(kinds) == 1 else kind,
        detail,
        shared,
        tuple(sorted(forms)),
        tuple(sorted(set(forms.values()))),
        example.tried.case,
        example.mismatch,
        len({id(failure.tried) for failure in failures}),
    )
