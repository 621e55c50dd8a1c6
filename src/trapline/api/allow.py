"""The allow list that a caller means."""

import os
from pathlib import Path

from trapline.allowlist import listfile
from trapline.allowlist.entries import AllowList

#: A list, the TOML file of one, or None for the eight ids of the e-mail.
AnyAllowList = AllowList | str | os.PathLike[str] | None


def allow_list(allow: AnyAllowList = None) -> AllowList:
    """Load an allow list; without one, the built-in one. Raises BadInputFileError."""
    if isinstance(allow, AllowList):
        return allow
    return listfile.load(None if allow is None else Path(allow))
