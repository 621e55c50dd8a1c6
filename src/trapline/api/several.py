"""Arguments of which there may be several."""

from collections.abc import Iterable


def several(given: str | Iterable[str]) -> tuple[str, ...]:
    """Take one name as a sequence of one, and not of its letters."""
    return (given,) if isinstance(given, str) else tuple(given)
