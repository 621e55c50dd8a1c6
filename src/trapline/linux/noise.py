"""What may differ between a run with an injected event and one without: declared, one by one.

`noise.toml` lists it with a reason each. A rule names memory by what the kernel calls it, and
is looked up in the symbols and types of the kernel at hand; what a kernel does not have is
left out. A rule may also demand a difference: an NMI that left no trace was lost.
"""

from importlib import resources
from typing import Annotated, Final, Literal

import msgspec

from trapline.base import decode
from trapline.base.errors import BadInputFileError

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_.$][\w.$]{0,199}$")]
# What an event is called in rules: its first word, or all of it.
EventName = Annotated[str, msgspec.Meta(pattern=r"^(nmi|irq|int80|ve|mce)(:[a-z0-9]+)?$")]
_MAX_FOLLOWED: Final = 1 << 20


class NoiseRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One piece of memory and why it may differ.

    `symbol` and `percpu` name variables, `static` all variables of functions that have this name
    (compilers number them: `_rs.0`); `through` names a per-CPU pointer (the first that
    exists) to a structure. `type` and `member` pick a part of the structure, found in BTF;
    `follow` goes to the so many bytes that this part points to. With `stack`, only what is not
    in use differs: all of it, or what is below RSP if RSP is inside. `region` "page-tables"
    stands for the accessed and dirty bits of the page tables, "dynamic" for all that is neither
    a variable nor the stack in use nor mapped by user mode. `bits` leaves all others of the
    little-endian number to be compared.

    With `array`, the variable is an array of the structure, and the member of each is meant.

    `events` are those that the rule is for (all if empty). `effect` "handled" means that the
    difference is what the event is for, and is not nothing. `by` demands that the little-endian
    number grows by exactly that much for each event that was delivered.
    """

    why: Annotated[str, msgspec.Meta(min_length=1)]
    symbol: Name | None = None
    percpu: Name | None = None
    static: Name | None = None
    through: tuple[Name, ...] = ()
    region: Literal["page-tables", "dynamic"] | None = None
    type: Name | None = None
    member: Name | None = None
    follow: Annotated[int, msgspec.Meta(ge=1, le=_MAX_FOLLOWED)] | None = None
    array: bool = False
    stack: bool = False
    events: tuple[EventName, ...] = ()
    effect: Literal["noise", "handled"] = "noise"
    by: int | None = None
    bits: Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)] | None = None

    @property
    def label(self) -> str:
        """What reports call the memory."""
        base = self.symbol or self.percpu or self.static or self.region or self.type or ""
        return f"{base}.{self.member}" if self.member else base

    def applies_to(self, event: str) -> bool:
        """Whether the rule is for this event."""
        if not self.events:
            return True
        return any(event == name or event.partition(":")[0] == name for name in self.events)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    noise: tuple[NoiseRule, ...]


def shipped_rules() -> tuple[NoiseRule, ...]:
    """Load the rules for Linux."""
    data = (resources.files("trapline.linux") / "noise.toml").read_bytes()
    return parse(data, "noise.toml")


def parse(data: bytes, source: str) -> tuple[NoiseRule, ...]:
    """Read rules from TOML; raises BadInputFileError."""
    rules = decode.convert(decode.toml(data, source), _File, source).noise
    for rule in rules:
        _check(rule, source)
    return rules


def _check(rule: NoiseRule, source: str) -> None:
    bases = [rule.symbol, rule.percpu, rule.static, rule.region, rule.through or None]
    if sum(base is not None for base in bases) != 1:
        raise BadInputFileError(
            f"{source}: a rule needs exactly one of symbol, percpu, static, through and region "
            f"({rule.why[:60]!r})."
        )
    if (rule.member is None) != (rule.type is None) or (rule.through and rule.member is None):
        raise BadInputFileError(f"{source}: {rule.label!r}: type and member go together.")
    if rule.array and (rule.type is None or rule.follow is not None):
        raise BadInputFileError(f"{source}: {rule.label!r}: an array is of a type, with a member.")
