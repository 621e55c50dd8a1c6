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


_NAMES: Final = tuple(Reg(number).name for number in range(16))
# Of a TDVMCALL: RCX says which registers are exposed, RAX is the leaf of TDCALL.
_CARRIERS: Final = tuple(number for number in range(16) if number != Reg.RCX)
_NO_INPUT: Final = frozenset(_CARRIERS) - {Reg.RAX}


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
    """Add what is new; a part that is stale in one lane only was so by chance."""
    wrong = {each.detail for each in (*found, *new) if each.kind == "wrong-register"}
    merged: dict[tuple[Kind, str], Mismatch] = {}
    for each in (*found, *new):
        stale = each.kind == "stale-bits" and each.detail in wrong
        merged.setdefault(symptom(each), each._replace(kind="wrong-register") if stale else each)
    parts = _news({detail for kind, detail in merged if kind == "wrong-register"})
    return [each for key, each in merged.items() if key[0] != "wrong-register" or key[1] in parts]


def _news(parts: set[str]) -> set[str]:
    """Drop the parts of which no more is known: what goes elsewhere, or is a wrong value."""
    if OTHER in parts:
        return parts - {SOURCE, EXTENSION, ABOVE}
    return parts - {EXTENSION} if SOURCE in parts else parts


# The parts of a destination.
SOURCE: Final = ""
EXTENSION: Final = "the extension"
ABOVE: Final = "above the destination"
# What is none of the instruction's business.
OTHER: Final = "another register"
FLOATS: Final = "SSE or x87 register"
# The answer to CPUID for a leaf that the host must not be asked for.
HOSTS_ANSWER: Final = "answer"
# An access that is right where all that is no operand is zero.
NO_OPERAND: Final = "bits that are no operand"


def register_mismatches(
    target: Target, before: tuple[int, ...], expected: tuple[int, ...], got: tuple[int, ...]
) -> list[Mismatch]:
    """Name the registers that differ, one mismatch for each part of what the instruction writes.

    Bits are stale if each wrong one is what it was before, and should not be.
    """
    wrong: dict[str, list[tuple[int, int]]] = {}
    for number in [number for number in range(16) if expected[number] != got[number]]:
        for part, mask in _parts(target, number):
            if (expected[number] ^ got[number]) & mask:
                wrong.setdefault(part, []).append((number, mask))
    found = []
    for part in sorted(_news(set(wrong))):
        fields = wrong[part]
        stale = all(
            (got[n] ^ before[n]) & (got[n] ^ expected[n]) & mask == 0
            and (expected[n] ^ before[n]) & mask
            for n, mask in fields
        )
        numbers = sorted({n for each in wrong.values() for n, _ in each})
        wanted, had = (
            ", ".join(f"{Reg(n).name}={values[n]:#x}" for n in numbers)
            for values in (expected, got)
        )
        found.append(Mismatch("stale-bits" if stale else "wrong-register", part, wanted, had))
    return found


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
    found: list[Mismatch] = []
    if expected == got:
        return found
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
        free = _NO_INPUT - documented_inputs(one)
        if one == two and not any(one[number] for number in free):
            continue
        for number in _CARRIERS:
            name = _NAMES[number]
            if name in found:
                continue
            if one[number] != two[number]:
                found[name] = Mismatch(
                    "leak-to-host",
                    name,
                    f"{name} the same whatever is in other registers",
                    f"{name}={one[number]:#x} and {two[number]:#x}, of the same operands",
                )
            elif number in free and one[number]:
                found[name] = Mismatch(
                    "leak-to-host", name, f"{name}=0", f"{name}={one[number]:#x}"
                )
    return list(found.values())
