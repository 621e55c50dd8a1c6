"""What a mistyped name was probably meant to be."""

import difflib
from collections.abc import Iterable

_MAX_NAME = 100  # difflib's time grows with the square


def nearest(name: str, known: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """Return the most similar of the known names, in whatever case, most similar first."""
    originals = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name[:_MAX_NAME].lower(), originals, n=count)
    return tuple(originals[one] for one in close)
