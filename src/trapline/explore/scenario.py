"""Scenarios: what is injected, where, and where the outcome is compared. They are TOML files.

    title = "NMI inside the #VE handler"
    why = "…"

    [start]                 # the window opens at the n-th time this happens
    trap = "msr"            # one of: symbol, syscall, trap, interrupt, nmi
    nth = 20                # interrupt and nmi: trapline posts it itself, see `Start`

    [end]                   # it closes, and the outcome is compared, here
    at = "return"           # "return", "user", "veinfo-get" or { symbol = "…" }

    [[inject]]
    event = "nmi"
    then = ["ve:wrmsr"]     # injected into the handling of the first, at every `stride`-th boundary
    stride = 64

A user's file is read exactly as the shipped ones in `scenarios/` are.
"""

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from trapline.base import decode, files
from trapline.base.errors import BadInputFileError, UsageError
from trapline.base.nearest import nearest
from trapline.results.explore import Verdict
from trapline.results.trapclass import EmulatedClass

_MAX_FILE: Final = 64 << 10
_MAX_TITLE: Final = 100
EACH: Final = "each"
_INTERRUPT: Final = r"^(timer|each|0x[2-9a-f][0-9a-f])$"
# A scenario of one of the vectors of one that is for each.
_OF_EACH: Final = re.compile(r"(.+):(0x[2-9a-f][0-9a-f])")
_SYMBOL: Final = r"^[A-Za-z_.$][\w.$]{0,199}$"

Symbol = Annotated[str, msgspec.Meta(pattern=_SYMBOL)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
TrapName = Literal[EmulatedClass, "any"]
EndName = Literal["return", "veinfo-get", "user"]

EVENTS: Final[dict[str, str]] = {
    "nmi": "a non-maskable interrupt; the module holds it while VE_INFO is valid",
    "irq:timer": "the local APIC timer's vector, as the guest programmed it",
    "irq:0xNN": "the external interrupt vector 0xNN, posted by the host",
    "int80": "vector 0x80 posted by the host, as if the guest had executed INT 0x80",
    "ve:wrmsr": "a #VE with exit reason WRMSR and length 0: handled, and nothing changes",
    "ve:mmio": "a #VE for a shared GPA, delivered by the CPU itself",
    "ve:notification": "the #VE that NOTIFY_ENABLES asks for, at any private access",
    "mce": "a machine check; the real module kills the TD instead",
}
_EVENT: Final = re.compile(
    r"nmi|irq:timer|irq:0x[2-9a-f][0-9a-f]|int80|ve:(?:wrmsr|mmio|notification)|mce"
)


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What opens the window; exactly one of the first five is given, or symbol and interrupt.

    A window opens with an event of the guest's own (`symbol`: a function is about to run;
    `syscall`; `trap`: a #VE of a class), or with one that trapline posts: `interrupt`, its
    vector's handler entered from user mode when the `nth` system call has returned, or with
    `symbol` before that function; `nmi` before the function it names. `interrupt = "each"` opens
    a window for each way that the IDT of the booted kernel has for interrupts; they are called
    `name:0xNN`. `within` counts only what happens while that function is on the stack (of several
    names, any; those that a kernel lacks are passed over), `after` only what happens once that
    function was called, `interrupts` only what happens to code that has interrupts on (or off),
    `user` only what happens to code of user mode (or not).
    """

    symbol: Symbol | None = None
    syscall: Annotated[int, msgspec.Meta(ge=0, le=1023)] | Literal["any"] | None = None
    trap: TrapName | None = None
    interrupt: Annotated[str, msgspec.Meta(pattern=_INTERRUPT)] | None = None
    nmi: Symbol | None = None
    within: Symbol | Annotated[tuple[Symbol, ...], msgspec.Meta(min_length=1)] | None = None
    after: Symbol | None = None
    interrupts: bool | None = None
    user: bool | None = None
    nth: Count = 1

    @property
    def within_any(self) -> tuple[str, ...]:
        """The names that `within` gives."""
        if self.within is None:
            return ()
        return (self.within,) if isinstance(self.within, str) else self.within


class EndSymbol(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The window closes when this function is about to run."""

    symbol: Symbol


class End(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What closes the window.

    "return": control is back where the start left it; "user": it is in user mode;
    "veinfo-get": VE_INFO has been collected; or a function is about to run.
    """

    at: EndName | EndSymbol = "return"


class Inject(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One event, tried at every boundary of the window; `then` nests others into its handling.

    `where = "entry"` tries it only in code that enters and leaves the kernel, where it has that in
    sections of its own.
    """

    event: str
    then: tuple[str, ...] = ()
    stride: Count = 1
    where: Literal["entry"] | None = None
    # What the kernel is meant to do, if it is not to go on.
    expect: tuple[Verdict, ...] = ()


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One scenario; `name` is its file's name, so that two files cannot claim one."""

    title: Annotated[str, msgspec.Meta(min_length=1, max_length=_MAX_TITLE)]
    why: Annotated[str, msgspec.Meta(max_length=2000)] = ""
    start: Start
    end: End = End()
    inject: Annotated[tuple[Inject, ...], msgspec.Meta(min_length=1, max_length=16)]
    append: str = ""  # to the kernel's command line
    mmio_uart: bool = False  # a second serial port on the board, its registers in memory
    name: str = ""


def is_event(name: str) -> bool:
    """Whether an event of that name can be injected."""
    return _EVENT.fullmatch(name) is not None


def shipped() -> tuple[str, ...]:
    """Name the scenarios that come with trapline, in alphabetical order."""
    folder = resources.files("trapline.explore") / "scenarios"
    return tuple(
        sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml"))
    )


def load(reference: str) -> Scenario:
    """Load a shipped scenario by name, or a file by its path; `:0xNN` behind it means one vector.

    Raises UsageError for an unknown name, BadInputFileError for a file that does not validate.
    """
    one = _OF_EACH.fullmatch(reference)
    if one is not None:
        whole = load(one[1])
        if whole.start.interrupt != EACH:
            raise UsageError(f"scenario {one[1]} is not one for each vector; drop ':{one[2]}'.")
        return of_vector(whole, int(one[2], 16))
    if "/" in reference or reference.endswith(".toml"):
        path = Path(reference)
        data = files.read(path, limit=_MAX_FILE, what="a scenario")
        return parse(data, str(path), path.stem)
    if reference not in shipped():
        close = nearest(reference, shipped())
        hint = (
            f"did you mean {' or '.join(close)}?"
            if close
            else f"name one of {', '.join(shipped())}, or the path of a TOML file."
        )
        raise UsageError(f"no scenario is called {reference!r}; {hint}")
    data = files.shipped("trapline.explore", f"scenarios/{reference}.toml")
    return parse(data, f"{reference}.toml", reference)


def of_vector(scenario: Scenario, vector: int) -> Scenario:
    """Make of a scenario that is for each vector the one for this vector."""
    return msgspec.structs.replace(
        scenario,
        name=f"{scenario.name}:{vector:#x}",
        title=f"{scenario.title}: {vector:#x}"[:_MAX_TITLE],
        start=msgspec.structs.replace(scenario.start, interrupt=f"{vector:#x}"),
    )


def family(name: str) -> str:
    """Return the name of the scenario of which a window's is one vector's, or that name."""
    one = _OF_EACH.fullmatch(name)
    return name if one is None else one[1]


def parse(data: bytes, source: str, name: str) -> Scenario:
    """Read one scenario from TOML; `source` is what error messages call it."""
    scenario = decode.convert(decode.toml(data, source), Scenario, source)
    _check(scenario, source)
    return msgspec.structs.replace(scenario, name=name)


def _check(scenario: Scenario, source: str) -> None:
    start = scenario.start
    given = [
        field
        for field in ("symbol", "syscall", "trap", "interrupt", "nmi")
        if getattr(start, field) is not None
    ]
    if len(given) != 1 and given != ["symbol", "interrupt"]:
        raise BadInputFileError(
            f"{source}: [start] needs exactly one of symbol, syscall, trap, interrupt and nmi "
            f"(or symbol with interrupt), it has {' and '.join(given) or 'none'}."
        )
    for inject in scenario.inject:
        for event in (inject.event, *inject.then):
            if not is_event(event):
                raise BadInputFileError(
                    f"{source}: {event!r} is not an event; known are {', '.join(EVENTS)}."
                )
    tried = [(one.event, event) for one in scenario.inject for event in one.then or (None,)]
    twice = next((pair for pair in tried if tried.count(pair) > 1), None)
    if twice is not None:
        what = twice[0] if twice[1] is None else f"{twice[1]} inside {twice[0]}"
        raise BadInputFileError(f"{source}: {what} is injected twice; drop one of the two.")
    if scenario.name:
        raise BadInputFileError(
            f"{source}: the name of a scenario is that of its file; drop `name`."
        )
