"""What differs between two runs, in words."""

from typing import Final, NamedTuple

from trapline.cpu.engine import Reg
from trapline.results.verify import Kind
from trapline.verify.fixture import Outcome
from trapline.verify.inputs import Target
from trapline.verify.world import M64, Access, documented_inputs, value_register

_FLAG_NAMES: Final = {
    0: "CF", 2: "PF", 4: "AF", 6: "ZF", 7: "SF", 8: "TF", 9: "IF", 10: "DF", 11: "OF", 14: "NT",
    16: "RF", 18: "AC", 21: "ID",
}  # fmt: skip


class Mismatch(NamedTuple):
    """One thing that differs, in words; `detail` tells apart what has the same kind."""

    kind: Kind
    detail: str
    expected: str
    got: str


def symptom(mismatch: Mismatch) -> tuple[Kind, str]:
    """Name what a mismatch is about; a wrong register is the same whether its bits are stale."""
    kind: Kind = "wrong-register" if mismatch.kind == "stale-bits" else mismatch.kind
    return kind, mismatch.detail


def ending_text(outcome: Outcome) -> str:
    """Say how a run ended."""
    if outcome.ending == "fault":
        return f"exception {outcome.detail}"
    if outcome.ending == "refused":
        return f"refused ({outcome.detail})"
    return {"done": "no exception"}.get(outcome.ending, outcome.detail)


def from_host(mismatch: Mismatch) -> Mismatch:
    """Say that a mismatch needs a host that fills unused output bits."""
    return mismatch._replace(kind="from-host")


def merge(found: list[Mismatch], new: list[Mismatch]) -> list[Mismatch]:
    """Add what is new; what is wrong with one destination in several lanes is one mismatch."""
    merged = {symptom(mismatch): mismatch for mismatch in reversed((*found, *new))}
    wrong = [each for each in (*found, *new) if each.kind in _DESTINATION and each.detail != FLOATS]
    if wrong:
        for each in wrong:
            merged.pop(symptom(each), None)
        parts = {part for each in wrong for part in each.detail.split(_AND)}
        kinds = {each.kind for each in wrong}
        kind: Kind = "stale-bits" if kinds == {"stale-bits"} else "wrong-register"
        whole = wrong[0]._replace(kind=kind, detail=_joined(parts))
        merged[symptom(whole)] = whole
    return list(reversed(merged.values()))


# The parts of a destination. If the value itself is wrong, the rest is no news.
SOURCE: Final = ""
EXTENSION: Final = "the extension"
ABOVE: Final = "above the destination"
# What is none of the instruction's business.
OTHER: Final = "another register"
FLOATS: Final = "SSE or x87 register"
# The answer to CPUID for a leaf that the host must not be asked for.
HOSTS_ANSWER: Final = "answer"
_AND: Final = " and "
_DESTINATION: Final = frozenset(("wrong-register", "stale-bits"))


def register_mismatches(
    target: Target, before: tuple[int, ...], expected: tuple[int, ...], got: tuple[int, ...]
) -> list[Mismatch]:
    """Name the registers that differ, and which part of what the instruction writes it is.

    Bits are stale if each wrong one is what it was before, and should not be.
    """
    wrong = [
        (number, part, mask)
        for number in range(16)
        for part, mask in _parts(target, number)
        if (expected[number] ^ got[number]) & mask
    ]
    if not wrong:
        return []
    stale = all(
        (got[n] ^ before[n]) & (got[n] ^ expected[n]) & mask == 0
        and (expected[n] ^ before[n]) & mask
        for n, _, mask in wrong
    )
    kind: Kind = "stale-bits" if stale else "wrong-register"
    numbers = dict.fromkeys(n for n, _, _ in wrong)
    wanted, had = (
        ", ".join(f"{Reg(n).name}={values[n]:#x}" for n in numbers) for values in (expected, got)
    )
    return [Mismatch(kind, _joined({part for _, part, _ in wrong}), wanted, had)]


def _joined(parts: set[str]) -> str:
    if OTHER in parts:
        return OTHER
    return "" if SOURCE in parts else _AND.join(sorted(parts, reverse=True))


def _parts(target: Target, number: int) -> list[tuple[str, int]]:
    """Cut a register into what is read from memory or a port, its extension, and the rest."""
    mask = target.written.get(number)
    if mask is None:
        return [(OTHER, M64)]
    low = mask & -mask
    source = mask & (low << target.width) - low
    return [(SOURCE, source), (EXTENSION, mask & ~source), (ABOVE, M64 & ~mask)]


def flag_mismatches(expected: int, got: int) -> list[Mismatch]:
    """One for each flag, so that two causes do not become one."""
    found = []
    for bit in range(22):
        if (expected ^ got) >> bit & 1:
            name = _FLAG_NAMES.get(bit, f"RFLAGS bit {bit}")
            found.append(
                Mismatch("wrong-flags", name, f"{name}={expected >> bit & 1}",
                         f"{name}={got >> bit & 1}")
            )  # fmt: skip
    return found


def memory_mismatch(expected: bytes, got: bytes) -> Mismatch:
    """Show the first bytes of the operand pages that differ, at their offset."""
    wrong = [at for at, (one, two) in enumerate(zip(expected, got, strict=True)) if one != two]
    start, end = wrong[0], min(wrong[-1] + 1, wrong[0] + 16)
    more = "" if wrong[-1] < end else " ..."
    return Mismatch(
        "wrong-memory",
        "",
        f"[{start:#x}] {expected[start:end].hex(' ')}{more}",
        f"[{start:#x}] {got[start:end].hex(' ')}{more}",
    )


def accesses_text(accesses: tuple[Access, ...]) -> str:
    """List accesses; the first few are enough."""
    texts = [_access(access) for access in accesses[:4]]
    return ", ".join(texts) + (", ..." if len(accesses) > 4 else "")


def without_consequences(
    found: list[Mismatch], calls: tuple[tuple[int, ...], ...]
) -> list[Mismatch]:
    """Drop what only follows: of a wrong value, that it is not the same in both lanes.

    And all else of a call that should not have been made.
    """
    needless = [each for each in found if each[:2] == ("from-host", HOSTS_ANSWER)]
    if needless:
        return needless
    if not any(each.kind in {"wrong-memory", "wrong-access"} for each in found):
        return found
    values = {reg.name for call in calls if (reg := value_register(call)) is not None}
    return [each for each in found if each.kind != "leak-to-host" or each.detail not in values]


def _access(access: Access) -> str:
    if access.what in {"mmio", "port"}:
        what = f"{'write' if access.is_write else 'read'} of {access.size} at {access.address:#x}"
        return f"{what}: {access.value:#x}" if access.is_write else what
    if access.what == "wrmsr":
        return f"wrmsr {access.address:#x}: {access.value:#x}"
    if access.what == "hlt":
        return f"hlt with interrupts {'blocked' if access.value else 'on'}"
    if access.what == "cpuid":
        return f"cpuid {access.address:#x}, sub-leaf {access.value:#x}"
    return f"{access.what} {access.address:#x}"


def find_leaks(first: Outcome, second: Outcome) -> list[Mismatch]:
    """Find what the host gets that does not follow from the operands.

    Both lanes have the same operands, so registers of the call may not differ; and those that
    carry no input of the call must be zero.
    """
    found: dict[str, Mismatch] = {}
    for one, two in zip(first.calls, second.calls, strict=False):
        inputs = documented_inputs(one)
        for number in range(16):
            name = Reg(number).name
            if number == Reg.RCX or name in found:
                continue
            differs = (one[number] ^ two[number]) & M64
            if differs:
                found[name] = Mismatch(
                    "leak-to-host",
                    name,
                    f"{name} the same whatever is in other registers",
                    f"{name}={one[number]:#x} and {two[number]:#x}, of the same operands",
                )
            elif number not in inputs and number != Reg.RAX and one[number]:
                found[name] = Mismatch(
                    "leak-to-host", name, f"{name}=0", f"{name}={one[number]:#x}"
                )
    return list(found.values())
