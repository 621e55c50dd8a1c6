"""A guest that dies before any window opens: what it died of is the finding."""

from typing import TYPE_CHECKING, Final

from trapline.cpu.engine import Reg
from trapline.explore.evidence import trap_lines
from trapline.explore.watch import OUTCOMES
from trapline.explore.window import instruction_text
from trapline.machine.observe.lastwords import take_splat
from trapline.results.explore import NOTHING, Boundary, Result, Window

if TYPE_CHECKING:
    from trapline.explore.scenario import Scenario
    from trapline.guest.target import Target
    from trapline.machine.machine import Machine
    from trapline.machine.outcome import RunOutcome

# What a host does to a guest, or a guest to itself, and what takes too long is no death.
_DEATHS: Final = ("panic", "double-fault", "triple-fault", "td-exit")


def has_died(outcome: "RunOutcome | None") -> bool:
    """Whether a guest came to an end that no sound kernel comes to."""
    return outcome is not None and not outcome.is_clean and OUTCOMES.get(outcome.kind) in _DEATHS


def death(
    machine: "Machine", target: "Target", scenario: "Scenario", reproduce: str
) -> tuple[Window, Result]:
    """Describe the death of a guest as a window of one instruction, its last."""
    outcome = machine.host.outcome
    assert outcome is not None
    vcpu = machine.vcpu
    rip = int(vcpu.regs[Reg.RIP])
    location = target.symbols.locate(rip, is_user=vcpu.cpl == 3)
    text = instruction_text(vcpu, rip)
    verdict = OUTCOMES[outcome.kind]
    detail = f"The guest dies before the window opens: {outcome.detail}"
    boundary = Boundary(
        index=0,
        function=location.function or location.label,
        offset=location.offset,
        ordinal=0,
        instruction=text,
    )
    window = Window(
        scenario=scenario.name,
        title=scenario.title,
        instructions=1,
        boundaries=(boundary,),
        forbidden=(),
    )
    splat = take_splat(
        vcpu,
        target.symbols,
        banner=f"{verdict}: {outcome.detail}",
        injected=(),
        traps=trap_lines(machine),
        reproduce=reproduce,
    )
    result = Result(
        scenario=scenario.name,
        event=NOTHING,
        boundary=0,
        nested=None,
        nested_at=None,
        allowed=True,
        rule=NOTHING,
        verdict=verdict,
        expected=False,
        detail=detail,
        differs=(),
        instructions=0,
        splat=splat,
        last=(f"{location.label}: {text}",),
        reproduce=reproduce,
    )
    return window, result
