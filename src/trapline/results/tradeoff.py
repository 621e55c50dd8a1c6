"""The result document of `trapline tradeoff`: schema "trapline/tradeoff".

One workload on one kernel under three designs: MMIO traps, is paravirtualised, or is forbidden.
"""

from typing import ClassVar, Final, Literal

from trapline.results.boot import BootKernel
from trapline.results.document import Document, ResultDocument

SCHEMA: Final = "trapline/tradeoff"
VERSION: Final = 1

DesignName = Literal["trap", "paravirt", "forbid"]


class WorkStep(Document, frozen=True, kw_only=True):
    """One part of the workload; `passed` is whether its result was checked and right."""

    name: str
    passed: bool


class Design(Document, frozen=True, kw_only=True):
    """What the workload cost under one design.

    `ves` counts all #VEs, `mmio_ves` those for MMIO; `direct` the MMIO accesses made by a host
    call without a #VE, `missed` those that took one although the design has none. `convert` and
    `growth` are the sites that the design would have to change and the bytes that this adds;
    `convert_used` are those of them that the run came by. `screams` are accesses, from
    `scream_places` places. `nmis` were sent to the guest; `in_nmi` and `nested` are as in
    trapline/boot. Seconds are of the virtual clock and of the wall clock.
    """

    name: DesignName
    steps: tuple[WorkStep, ...]
    outcome: str
    ves: int
    mmio_ves: int
    direct: int
    missed: int
    tdvmcalls: int
    convert: int
    convert_used: int
    growth: int
    nmis: int
    in_nmi: int
    nested: int
    screams: int
    scream_places: int
    virtual_seconds: float
    wall_seconds: float


class TradeoffResult(ResultDocument, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """The designs in the order trap, paravirt, forbid.

    `missed_places` are functions that a conversion of the scanned sites would have missed,
    `method` says of each number how it was got.
    """

    lists: ClassVar = ("designs",)

    schema_: Literal["trapline/tradeoff"] = SCHEMA
    version: Literal[1] = VERSION
    generator: str
    kernel: BootKernel
    module_version: str
    devices: tuple[str, ...]
    designs: tuple[Design, ...]
    missed_places: tuple[str, ...]
    method: dict[str, str]
