"""The result document of `trapline scan`: schema "trapline/scan".

It is the only contract between finding sites and showing them. Addresses are link-time
addresses; for a module, which has none before it is loaded, offsets in `section`. They are
written as hexadecimal strings since JSON numbers lose bits above 2**53.
"""

from typing import ClassVar, Final, Literal

from trapline.results.document import Document, ResultDocument
from trapline.results.labels import Labelled
from trapline.results.trapclass import TrapClass

SCHEMA: Final = "trapline/scan"
VERSION: Final = 2

Access = Literal["read", "write", "read-write", "execute"]
Form = Literal["instruction", "paravirt", "call"]


class Frame(Document, frozen=True, kw_only=True):
    """One function of an inline chain; `file:line` is the place inside `function`."""

    function: str
    file: str | None
    line: int | None

    def summary(self) -> str:
        """Say it in one cell of a row."""
        place = "" if self.file is None else f" {self.file}:{self.line or '?'}"
        return self.function + place


class Site(Document, frozen=True, kw_only=True, rename={"trap": "class"}):
    """One place where the kernel may trap to its host.

    `form` is "instruction" for an instruction that traps itself, "paravirt" for a pv_ops
    call that hides one, "call" for a call of an out-of-line accessor. `width` is in bytes,
    0 where the size is not fixed. `inlined` runs from the innermost frame outwards and does
    not hold `function`, the out-of-line function the bytes belong to. `object` is the object
    file below the source tree. Code in .altinstr_replacement is copied to `origin` at boot: all
    but `address` and `section` is then said of the origin. `mapped_by` is what returned the pointer
    where device memory is accessed without an accessor. `emulable` is whether Linux's #VE
    handler emulates the form, `reason` says why or why not.

    `owner`, `spot` and `landed` are what the next kernel's site is matched by beside the id: the
    function in the source that names the site, inlined or not; line and column of each call from
    there inwards, "11:5 2:9", relative to the start of the function that it is in, and at the end
    the line of the site if no inlined accessor stands for it; and what the compiler inlined `owner`
    into, outermost first, "a/b". None where debug information does not tell.
    """

    id: str
    trap: TrapClass
    form: Form
    access: Access
    width: int
    accessor: str | None
    module: str
    object: str | None
    function: str
    file: str | None
    line: int | None
    inlined: tuple[Frame, ...]
    instruction: str
    bytes: str
    address: str
    section: str
    origin: str | None
    emulable: bool
    reason: str
    driver: str | None
    subsystem: str
    mapped_by: str | None = None
    owner: str | None = None
    spot: str | None = None
    landed: str | None = None


class Mapping(Document, frozen=True, kw_only=True):
    """A call that maps device memory: where a driver filter can act."""

    id: str
    mapper: str
    module: str
    object: str | None
    function: str
    file: str | None
    line: int | None
    inlined: tuple[Frame, ...]
    address: str
    section: str
    driver: str | None
    subsystem: str
    owner: str | None = None
    spot: str | None = None
    landed: str | None = None


class Driver(Document, frozen=True, kw_only=True):
    """A driver, built in or a module, with what it matches and what it touches.

    `allowed` is true when the allow list lets it bind to some device; `via` is the path
    from an allowed PCI id to the driver; `reaches` are the objects that touch the host on
    its behalf (transport, MSI-X).
    """

    name: str
    bus: str
    module: str
    builtin: bool
    aliases: tuple[str, ...]
    allowed: bool
    via: tuple[str, ...]
    reaches: tuple[str, ...]
    sites: int
    mmio: int
    calls: int


class Kernel(Document, frozen=True, kw_only=True):
    """What was scanned. `config` holds the options trapline's answers depend on."""

    release: str | None
    version: str | None
    build_id: str | None
    config: dict[str, str]
    modules: int
    has_dwarf: bool


class Outside(Document, frozen=True, kw_only=True):
    """Bytes of a section with the flag of code that nothing describes as code.

    `patterns` of them read like instructions that trap; they are no sites. `size` is in bytes.
    """

    section: str
    writable: bool
    size: int
    patterns: int


class Unrecognised(Document, frozen=True, kw_only=True, rename={"trap": "class"}):
    """A function that accesses what its caller says and that trapline does not know.

    Its own traps are sites; calls of it are none.
    """

    function: str
    trap: TrapClass
    module: str
    file: str | None
    line: int | None


class Coverage(Document, frozen=True, kw_only=True):
    """What the scan could not see, in words a report prints as they are.

    `outside` is what it saw in vmlinux and did not take for code, `unrecognised` what may be an
    accessor.
    """

    complete: bool
    missing: tuple[str, ...]
    advice: tuple[str, ...]
    outside: tuple[Outside, ...] = ()
    unrecognised: tuple[Unrecognised, ...] = ()


class AllowedId(Document, frozen=True, kw_only=True):
    """One entry of the allow list that was applied."""

    id: str
    name: str
    note: str | None


class ScanResult(ResultDocument, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """Everything one scan found."""

    lists: ClassVar = ("sites", "mappings", "drivers")

    schema_: Literal["trapline/scan"] = SCHEMA
    version: Literal[2] = VERSION
    generator: str
    kernel: Kernel
    allow: tuple[AllowedId, ...]
    coverage: Coverage
    counts: dict[str, int]
    sites: tuple[Site, ...]
    mappings: tuple[Mapping, ...]
    drivers: tuple[Driver, ...]
    labels: tuple[Labelled, ...] = ()

    def let_in(self) -> tuple[Driver, ...]:
        """Give the drivers that the allow list lets bind."""
        return tuple(driver for driver in self.drivers if driver.allowed)

    def reached(self) -> tuple[str, ...]:
        """Name what touches the host on behalf of drivers that are let in.

        A name is that of a driver (`virtio_ring`; `virtio_pci`, which is let in itself) or of a
        subsystem (`PCI MSI`).
        """
        return tuple(dict.fromkeys(name for driver in self.let_in() for name in driver.reaches))
