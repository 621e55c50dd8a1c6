"""The result document of `trapline boot`: schema "trapline/boot".

Addresses and hashes are hexadecimal strings, since JSON numbers lose bits above 2**53. Times
are seconds of the guest's virtual clock. Counts of traps are of the whole run.
"""

from typing import ClassVar, Final, Literal, get_args

import msgspec

from trapline.results.document import Document, ResultDocument
from trapline.results.labels import Labelled
from trapline.results.scan import Frame
from trapline.results.splat import Splat, Task
from trapline.results.trapclass import TrapClass

SCHEMA: Final = "trapline/boot"
VERSION: Final = 1

# Milder than a way to die: `trapline.linux.messages` knows them by their words.
ComplaintKind = Literal[
    "oops", "bug", "warning", "soft-lockup", "hard-lockup", "rcu-stall", "hung-task"
]
COMPLAINT_KINDS: Final[frozenset[ComplaintKind]] = frozenset(get_args(ComplaintKind))
ImageKind = Literal["vmlinux", "bzImage"]
Standing = Literal["found", "unaccounted", "outside"]
TrapContext = Literal[
    "user mode",
    "early",
    "interrupts off",
    "soft interrupt",
    "hard interrupt",
    "NMI",
    "#VE handler",
    "panic",
    "VE_INFO in use",
    "user GS",
    "user stack",
]
CONTEXTS: Final[tuple[TrapContext, ...]] = get_args(TrapContext)
#: Contexts in which no trap may come: it is a #DF, or its handler runs on what is not its own.
FORBIDDEN_CONTEXTS: Final[frozenset[TrapContext]] = frozenset(
    ("VE_INFO in use", "user GS", "user stack")
)


class BootKernel(Document, frozen=True, kw_only=True):
    """The kernel that ran. `slide` is where KASLR put it: run-time minus link-time address."""

    release: str | None
    build_id: str | None
    image: ImageKind
    file: str
    slide: str | None


class BootMachine(Document, frozen=True, kw_only=True):
    """The TD it ran in; sizes in bytes."""

    module_version: str
    memory: int
    unaccepted: int
    command_line: str
    initrd: str
    devices: tuple[str, ...]


class BootOutcome(Document, frozen=True, kw_only=True):
    """How it ended. `kind` is "powered-off", "panic", …; `place` is where the guest was."""

    kind: str
    detail: str
    exit_code: int
    seconds: float
    place: str


class Milestone(Document, frozen=True, kw_only=True):
    """A point that the guest reached, and by what it was recognised."""

    name: str
    seconds: float
    evidence: str


class TrapSite(Document, frozen=True, kw_only=True, rename={"trap": "class"}):
    """One instruction that trapped, and how often.

    `image` is "vmlinux", a module's name, "decompressor" or "user"; `address` the run-time
    address, `link_address` the one in the image. `label` is `function+0x12/0x80`. `inlined`
    runs from the innermost frame outwards without `function`. `standing` tells whether the
    scan of the same kernel has the site: "found" with its `scan_id`; "unaccounted" with the
    reason; "outside" for code that the scan does not cover by design, with the reason.
    """

    trap: TrapClass
    count: int
    image: str
    address: str
    link_address: str | None
    label: str
    function: str | None
    file: str | None
    line: int | None
    inlined: tuple[Frame, ...]
    standing: Standing
    scan_id: str | None
    reason: str


class Soundness(Document, frozen=True, kw_only=True):
    """How many traps, and places that trapped, the scan had foreseen.

    Code that the scan does not cover by design (decompressor, ring 3) counts in none of these
    numbers but `outside_traps`. `scanned` is false when there was no scan to compare with.
    """

    scanned: bool
    traps: int
    traps_found: int
    sites: int
    sites_found: int
    outside_traps: int


class Hashes(Document, frozen=True, kw_only=True):
    """BLAKE2b-128 of what happened: equal for equal runs."""

    trace: str
    console: str
    ram: str


class Refusals(Document, frozen=True, kw_only=True):
    """What the guest asked for and nobody answered; address or index to count.

    `dma` are GPAs of pages that a device was sent to though the guest had not shared them.
    """

    ports: dict[str, int]
    mmio: dict[str, int]
    msrs: dict[str, int]
    dma: tuple[str, ...] = ()


class BootDevice(Document, frozen=True, kw_only=True):
    """A PCI function that was attached.

    `allowed` is whether the allow list lets it in, None without a list; `hidden` whether the
    guest was kept from seeing it. `drivers` are those that the kernel had bound when the run
    ended: the PCI driver's name, then those of what it made (virtio_blk below virtio-pci).
    """

    slot: str
    id: str
    name: str
    allowed: bool | None
    hidden: bool
    drivers: tuple[str, ...]


class Scream(Document, frozen=True, kw_only=True, rename={"trap": "class"}):
    """Accesses from one place that a policy forbids, or to a device that is not on the list.

    `address` is the first access's: a port, a GPA, an MSR or a CPUID leaf. `device` is the slot
    it belongs to, `driver` what the kernel had bound there, else whose code it is. Only the
    first places come with their splat.
    """

    reason: Literal["forbidden", "not-allowed"]
    trap: TrapClass
    count: int
    address: str
    label: str
    device: str | None
    driver: str | None
    scan_id: str | None
    splat: Splat | None


class Complaint(Document, frozen=True, kw_only=True):
    """What the guest's kernel said went wrong, without ending the guest; one for each kind.

    `text` and `seconds` are of the first of `count`, and so is `splat`: of what went wrong, not of
    who prints it. `fails`: this kind is not put up with (`--fail-on`).
    """

    kind: ComplaintKind
    count: int
    seconds: float
    text: str
    fails: bool
    splat: Splat | None


class RunProgram(Document, frozen=True, kw_only=True):
    """The program that the guest was booted for (`--run`).

    `exit_code` is None where the guest ended before it told. `out` and `err` are the bytes that it
    printed.
    """

    name: str
    exit_code: int | None
    out: int
    err: int


class BootPolicy(Document, frozen=True, kw_only=True):
    """What was done about which class of access; classes that are not named trap.

    `paravirtualised` counts the accesses that were made without a #VE, `missed` those that
    took one all the same; their places are the sites of that class.
    """

    classes: dict[str, str] = msgspec.field(default_factory=dict)
    paravirtualised: dict[str, int] = msgspec.field(default_factory=dict)
    missed: dict[str, int] = msgspec.field(default_factory=dict)


class OtherModule(Document, frozen=True, kw_only=True):
    """The same boot on another version of the TDX module.

    `traps` and `tdvmcalls` are as in the result; `places` counts the places that trap, by class.
    `gone` are the labels of places that trap in the result and not here, `new` the other way round.
    """

    module_version: str
    outcome: BootOutcome
    traps: dict[str, int]
    places: dict[str, int]
    tdvmcalls: dict[str, int]
    gone: tuple[str, ...]
    new: tuple[str, ...]


class BootResult(ResultDocument, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """Everything one boot showed.

    `traps` counts #VE by class; `tdcalls` and `tdvmcalls` count calls by name. `splat` is the
    last state of a guest that died, `complaints` what its kernel lived on after. `tasks` are those
    of a guest that came to no end, PID 1 first, and `last_line` what it said last. `in_nmi` counts
    #VEs while NMIs were blocked, `nested` those between a #VE and the TDVMCALL by which its handler
    serves it. `contexts` counts #VEs by class and context; one may be in several contexts, most are
    in none. `repeatable`: the same command gives the same hashes; not so with devices, which live
    by the wall clock. `other_module` is what the same boot did on another one, if that was asked.
    """

    lists: ClassVar = (
        "sites", "milestones", "devices", "screams", "unaccounted", "complaints"
    )  # fmt: skip

    schema_: Literal["trapline/boot"] = SCHEMA
    version: Literal[1] = VERSION
    generator: str
    kernel: BootKernel
    machine: BootMachine
    outcome: BootOutcome
    milestones: tuple[Milestone, ...]
    traps: dict[str, int]
    tdcalls: dict[str, int]
    tdvmcalls: dict[str, int]
    sites: tuple[TrapSite, ...]
    sites_dropped: int
    soundness: Soundness
    unaccounted: tuple[TrapSite, ...]
    refused: Refusals
    console_bytes: int
    hashes: Hashes
    splat: Splat | None
    complaints: tuple[Complaint, ...] = ()
    tasks: tuple[Task, ...] = ()
    last_line: str = ""
    program: RunProgram | None = None
    devices: tuple[BootDevice, ...] = ()
    policy: BootPolicy = BootPolicy()
    screams: tuple[Scream, ...] = ()
    screams_dropped: int = 0
    in_nmi: int = 0
    nested: int = 0
    contexts: dict[str, dict[str, int]] = msgspec.field(default_factory=dict)
    repeatable: bool = True
    labels: tuple[Labelled, ...] = ()
    other_module: OtherModule | None = None
