"""`check_machine`: the machine this runs on, held against an allow list."""

from pathlib import Path
from typing import TYPE_CHECKING

from trapline.api.allow import allow_list
from trapline.devicefilter import live

if TYPE_CHECKING:
    from trapline.api.allow import AnyAllowList
    from trapline.api.kernel import AnyPath
    from trapline.results.filter_live import LiveResult


def check_machine(*, root: "AnyPath" = "/", allow: "AnyAllowList" = None) -> "LiveResult":
    """Say whether a machine is a TD, and what in it is against an allow list.

    `root` is where its proc and sys are: a copy of another machine's will do. Raises UsageError
    where there are none.
    """
    return live.inspect(Path(root), allow_list(allow))
