"""What differs between two runs, in words."""

from typing import Final, NamedTuple

from trapline.cpu.engine import Reg
from trapline.results.verify import Kind
from trapline.verify.fixture import Outcome
from trapline.verify.inputs import M64
from trapline.verify.world import Access, documented_inputs

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
    """Add what is new. A register that is stale in one lane only was so by chance."""
    kinds = {mismatch.kind for mismatch in (*found, *new)}
    if "wrong-register" in kinds:
        chosen: Kind = "wrong-register"
        found, new = (
            [each._replace(kind=chosen) if each.kind == "stale-bits" else each for each in part]
            for part in (found, new)
        )
    known = {mismatch[:2] for mismatch in found}
    return found + [each for each in new if each[:2] not in known]


def register_mismatch(
    before: tuple[int, ...], expected: tuple[int, ...], got: tuple[int, ...]
) -> Mismatch:
    """Name the registers that differ: stale if each wrong bit is what it was before."""
    wrong = [number for number in range(16) if expected[number] != got[number]]
    stale = all((got[n] ^ before[n]) & (got[n] ^ expected[n]) == 0 for n in wrong)
    changed = all(expected[n] != before[n] for n in wrong)
    kind: Kind = "stale-bits" if stale and changed else "wrong-register"
    return Mismatch(
        kind,
        "",
        ", ".join(f"{Reg(n).name}={expected[n]:#x}" for n in wrong),
        ", ".join(f"{Reg(n).name}={got[n]:#x}" for n in wrong),
    )


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
