"""trapline: where a compiled Linux kernel traps to its host, counted, run and tried.

    import trapline

    kernel = trapline.open_kernel("deb:linux-image-6.12-cloud-amd64", announce=print)
    result = trapline.scan(kernel, progress=print)
    print(len(result.sites), "places may trap")

Each function takes a kernel and options, and returns one frozen result document, the same that the
command of that name writes as JSON; docs/api.md describes them all. What a user can cause is
raised as a `TraplineError` whose text is one sentence.

The functions are imported when they are first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from trapline.base.version import __version__

if TYPE_CHECKING:
    from trapline.allowlist.entries import AllowList
    from trapline.api.allow import allow_list
    from trapline.api.boot import boot
    from trapline.api.check import check
    from trapline.api.check_machine import check_machine
    from trapline.api.contexts import contexts
    from trapline.api.diff import diff
    from trapline.api.explore import explore
    from trapline.api.export_filter import export_filter
    from trapline.api.gate import gate
    from trapline.api.kernel import Kernel, open_kernel
    from trapline.api.label import (
        add_label,
        carry_labels,
        labelled,
        list_labels,
        load_labels,
        save_labels,
    )
    from trapline.api.progress import Progress
    from trapline.api.scan import scan
    from trapline.api.tradeoff import tradeoff
    from trapline.api.verify import verify
    from trapline.base.errors import ExitCode, TraplineError
    from trapline.results.findings import findings
    from trapline.results.reading import read_result

__all__ = [
    "AllowList",
    "ExitCode",
    "Kernel",
    "Progress",
    "TraplineError",
    "__version__",
    "add_label",
    "allow_list",
    "boot",
    "carry_labels",
    "check",
    "check_machine",
    "contexts",
    "diff",
    "explore",
    "export_filter",
    "findings",
    "gate",
    "labelled",
    "list_labels",
    "load_labels",
    "open_kernel",
    "read_result",
    "save_labels",
    "scan",
    "tradeoff",
    "verify",
]

# Public name -> the module that has it.
_HOMES: Final = {
    "AllowList": "trapline.allowlist.entries",
    "ExitCode": "trapline.base.errors",
    "Kernel": "trapline.api.kernel",
    "Progress": "trapline.api.progress",
    "TraplineError": "trapline.base.errors",
    "add_label": "trapline.api.label",
    "allow_list": "trapline.api.allow",
    "boot": "trapline.api.boot",
    "carry_labels": "trapline.api.label",
    "check": "trapline.api.check",
    "check_machine": "trapline.api.check_machine",
    "contexts": "trapline.api.contexts",
    "diff": "trapline.api.diff",
    "explore": "trapline.api.explore",
    "export_filter": "trapline.api.export_filter",
    "findings": "trapline.results.findings",
    "gate": "trapline.api.gate",
    "labelled": "trapline.api.label",
    "list_labels": "trapline.api.label",
    "load_labels": "trapline.api.label",
    "open_kernel": "trapline.api.kernel",
    "read_result": "trapline.results.reading",
    "save_labels": "trapline.api.label",
    "scan": "trapline.api.scan",
    "tradeoff": "trapline.api.tradeoff",
    "verify": "trapline.api.verify",
}


class _Package(ModuleType):
    """A package in which `scan` is the function, though a room of that name is imported, too.

    Importing trapline.scan.objects makes the import system bind trapline.scan to the room. The
    room is reached by its full name all the same: `from trapline.scan.objects import …`.
    """

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever is public
        """Import a public name when it is first used."""
        if name not in _HOMES:
            raise AttributeError(f"module 'trapline' has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
