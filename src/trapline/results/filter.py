"""The result document of `trapline filter check`: schema "trapline/filter".

It says of each driver of a kernel whether an allow list lets it in, and of those it keeps out
which bind before a filter in user space could act.
"""

from typing import ClassVar, Final, Literal

from trapline.results.document import Document, ResultDocument
from trapline.results.labels import Labelled
from trapline.results.scan import AllowedId, Coverage, Kernel

SCHEMA: Final = "trapline/filter"
VERSION: Final = 1

#: "allowed": some device on the list binds to it. "loophole": none does as its id says, but the
#: host can make one do so by what an id does not tell. "outside": no listed id can.
Verdict = Literal["allowed", "loophole", "outside"]


class Reach(Document, frozen=True, kw_only=True):
    """How much code of one driver or subsystem touches the host, in sites of the scan.

    `mmio`: MMIO instructions; `calls`: calls of out-of-line MMIO accessors; `pio`: port I/O of
    either kind; `other`: all other classes; `mappings`: calls that map device memory.
    """

    mmio: int
    calls: int
    pio: int
    other: int
    mappings: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.mmio + self.calls + self.pio + self.other + self.mappings


class FilterDriver(Document, frozen=True, kw_only=True):
    """One driver held against the list.

    `early`: it is built in and binds to devices, so it probes before any user-space filter.
    `via` and `loopholes` are ways from an id of the list to the driver. `reach` is its own
    code, `reaches` names what touches the host on its behalf.
    """

    name: str
    bus: str
    builtin: bool
    early: bool
    verdict: Verdict
    via: tuple[str, ...]
    loopholes: tuple[str, ...]
    reaches: tuple[str, ...]
    reach: Reach


class Shared(Document, frozen=True, kw_only=True):
    """Code that acts for drivers that are let in: a driver's name, or a subsystem's."""

    name: str
    reach: Reach


class FilterResult(ResultDocument, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """What an allow list means for one kernel.

    `drivers` are sorted by name. `unused` are PCI ids and classes of the list that no driver
    takes, or only the virtio transport. `findings` are the names of drivers that are built in,
    are not let in, bind to devices and touch the host.
    """

    lists: ClassVar = ("drivers", "shared")

    schema_: Literal["trapline/filter"] = SCHEMA
    version: Literal[1] = VERSION
    generator: str
    kernel: Kernel
    coverage: Coverage
    title: str
    allow: tuple[AllowedId, ...]
    drivers: tuple[FilterDriver, ...]
    shared: tuple[Shared, ...]
    unused: tuple[str, ...]
    findings: tuple[str, ...]
    labels: tuple[Labelled, ...] = ()
