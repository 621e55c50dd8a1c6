"""Which place of a new kernel is which of an old one, where the id does not tell.

From what is surest to what is likely, one to one: the same function and accessor of one object, in
the order of the source; a file that moved; a function that was renamed; an accessor that was
replaced. What is paired so is for a person to confirm.
"""

import posixpath
from collections import defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from trapline.labels.subjects import Subject

_MOST: Final = 400  # likes of one kind whose lines are compared each with each
_FAR: Final = 1 << 20  # a line that is not known


class Pair(NamedTuple):
    """An old and a new place; `how` says by what they were taken for one."""

    old: "Subject"
    new: "Subject"
    how: str


def pair(old: "Iterable[Subject]", new: "Iterable[Subject]") -> list[Pair]:
    """Pair what has a place; nothing is paired twice.

    Those with one id must not be among them.
    """
    left = [one for one in old if one.place is not None]
    right = [one for one in new if one.place is not None]
    pairs: list[Pair] = []
    for how, key in _WAYS:
        found = _stage(left, right, how, key)
        pairs += found
        olds, news = {p.old.id for p in found}, {p.new.id for p in found}
        left = [one for one in left if one.id not in olds]
        right = [one for one in right if one.id not in news]
    return pairs


def _stage(
    left: "Sequence[Subject]",
    right: "Sequence[Subject]",
    how: str,
    key: "Callable[[Subject], Hashable | None]",
) -> list[Pair]:
    groups: defaultdict[Hashable, tuple[list[Subject], list[Subject]]] = defaultdict(
        lambda: ([], [])
    )
    for side, subjects in enumerate((left, right)):
        for one in subjects:
            name = key(one)
            if name is not None:
                groups[name][side].append(one)
    return [
        Pair(mine, theirs, how)
        for olds, news in groups.values()
        for mine, theirs in _in_order(sorted(olds, key=_spot), sorted(news, key=_spot))
    ]


def _in_order(
    olds: "Sequence[Subject]", news: "Sequence[Subject]"
) -> "list[tuple[Subject, Subject]]":
    """Pair as many as there are of both, in order, so that lines move as little as they can."""
    if len(olds) == len(news) or not olds or not news or len(olds) * len(news) > _MOST**2:
        return list(zip(olds, news, strict=False))
    flipped = len(olds) > len(news)
    few, many = (news, olds) if flipped else (olds, news)
    # best[j]: what it costs to pair the first i of the few with some of the first j of the many.
    best: list[float] = [0.0] * (len(many) + 1)
    taken: list[list[bool]] = []
    for one in few:
        row = [float("inf")] * (len(many) + 1)
        take = [False] * (len(many) + 1)
        for at, other in enumerate(many, 1):
            with_it = best[at - 1] + abs(_line(one) - _line(other))
            take[at] = with_it < row[at - 1]
            row[at] = min(with_it, row[at - 1])
        best = row
        taken.append(take)
    chosen = []
    at = len(many)
    for number in range(len(few) - 1, -1, -1):
        while not taken[number][at]:
            at -= 1
        chosen.append((few[number], many[at - 1]))
        at -= 1
    return [(b, a) if flipped else (a, b) for a, b in reversed(chosen)]


def _spot(one: "Subject") -> tuple[tuple[int, ...], str]:
    """Order places as they stand in the source."""
    spot = "" if one.place is None else one.place.spot or ""
    numbers = (part for call in spot.split() for part in call.split(":"))
    return tuple(_number(part) for part in numbers), one.id


def _line(one: "Subject") -> int:
    numbers, _ = _spot(one)
    return numbers[0] if numbers else _FAR


def _number(text: str) -> int:
    return int(text) if text.lstrip("-").isdigit() and len(text) < 10 else _FAR


def _by_function(one: "Subject") -> "Hashable | None":
    place = one.place
    if place is None or place.owner is None:
        return None
    return (place.object, place.owner, place.kind, place.access, place.accessor)


def _by_file_name(one: "Subject") -> "Hashable | None":
    place = one.place
    if place is None or place.object is None or place.owner is None:
        return None
    name = posixpath.basename(place.object)
    return (name, place.owner, place.kind, place.access, place.accessor)


def _by_function_anywhere(one: "Subject") -> "Hashable | None":
    place = one.place
    if place is None or place.owner is None:
        return None
    return (place.owner, place.kind, place.access, place.accessor)


def _by_spot(one: "Subject") -> "Hashable | None":
    place = one.place
    if place is None or place.object is None or not place.spot:
        return None
    return (place.object, place.spot, place.kind, place.access, place.accessor)


def _by_class(one: "Subject") -> "Hashable | None":
    place = one.place
    if place is None or place.owner is None:
        return None
    return (place.object, place.owner, place.kind, (place.access or "").partition(" ")[0])


_WAYS: "Final[tuple[tuple[str, Callable[[Subject], Hashable | None]], ...]]" = (
    ("the same function and accessor", _by_function),
    ("the same function in a file of that name", _by_file_name),
    ("a function of that name in another file", _by_function_anywhere),
    ("the same spot in a function of another name", _by_spot),
    ("another accessor in the same function", _by_class),
)
