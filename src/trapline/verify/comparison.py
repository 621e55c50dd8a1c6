"""What differs between a native and a trapped run of one case that both went on behind it."""

from typing import Final

import iced_x86 as ix

from trapline.cpu.engine import Reg
from trapline.verify.cases import Case
from trapline.verify.differences import (
    FLOATS,
    HOSTS_ANSWER,
    Mismatch,
    accesses_text,
    ending_text,
    flag_mismatches,
    memory_mismatch,
    register_mismatches,
)
from trapline.verify.fixture import Outcome
from trapline.verify.inputs import Lanes, Target
from trapline.verify.testpages import KERNEL_BASE, OPERAND_AT, PAGE, USER_BASE, USER_HALF_END
from trapline.verify.world import Access

# What the host answers to CPUID.
CPUID: Final = (0x91A1_B1C1, 0xA2B2_C2D2, 0xB3C3_D3E3, 0xC4D4_E4F4)
_SOFTWARE_LEAVES: Final = 4  # bits 31:28 of the leaf


class Comparison:
    """Compares the outcomes of one case; `lanes` are the states that it was run from."""

    def __init__(
        self, case: Case, instruction: ix.Instruction, target: Target, lanes: Lanes
    ) -> None:
        self._case = case
        self._instruction = instruction
        self._lanes = lanes
        self._target = target

    def compare(self, lane: int, native: Outcome, trapped: Outcome) -> list[Mismatch]:
        """Compare two runs from the same state."""
        if trapped.ending != "done" or native.ending != "done":
            if (trapped.ending, trapped.detail) == (native.ending, native.detail):
                return []
            return [Mismatch("wrong-exception", "", ending_text(native), ending_text(trapped))]
        wanted = self._wanted_accesses(native, trapped)
        got = trapped.accesses
        # What the guest has in registers and memory after a wrong access only follows from it.
        if trusted := self._trusted_answer(trapped):
            return trusted
        if wanted is not None and _shapes(wanted) != _shapes(got):
            return [_wrong_access(wanted, got)]
        expected = native.regs
        if self._case.trap == "cpuid":
            expected = self._free_answer(lane, trapped)
        found = [
            *register_mismatches(self._target, self._lanes.regs[lane], expected, trapped.regs),
            *flag_mismatches(native.rflags, trapped.rflags),
            *_beside_registers(native, trapped),
        ]
        # The wrong value is reported as wrong memory, where there is memory.
        if wanted is not None and wanted != got and native.memory == trapped.memory:
            found.append(_wrong_access(wanted, got))
        return found

    def _free_answer(self, lane: int, trapped: Outcome) -> tuple[int, ...]:
        """Return what CPUID may leave: any answer of 32 bits, the rest as it was."""
        expected = list(self._lanes.regs[lane])
        asked = bool(trapped.accesses)
        order = (Reg.RAX, Reg.RBX, Reg.RCX, Reg.RDX)
        for number, value in zip(order, CPUID, strict=True):
            expected[number] = value if asked else trapped.regs[number] & 0xFFFFFFFF
        return tuple(expected)

    def _trusted_answer(self, trapped: Outcome) -> list[Mismatch]:
        """Find a leaf of the processor's that the host was asked for.

        Only leaves 40000000h to 4FFFFFFFh are nobody's but software's (SDM volume 2, CPUID).
        """
        asked = [access.address for access in trapped.accesses if access.what == "cpuid"]
        if not asked or asked[0] >> 28 == _SOFTWARE_LEAVES:
            return []
        return [
            Mismatch(
                "from-host", HOSTS_ANSWER, "no answer of the host: the leaf is the processor's",
                accesses_text(trapped.accesses),
            )
        ]  # fmt: skip

    def answers(self, first: Outcome, second: Outcome) -> list[Mismatch]:
        """Compare answers to CPUID: they follow from EAX and ECX, the same in all lanes."""
        order = (Reg.RAX, Reg.RBX, Reg.RCX, Reg.RDX)
        one, two = (
            [outcome.regs[number] & 0xFFFFFFFF for number in order] for outcome in (first, second)
        )
        if self._case.trap != "cpuid" or one == two:
            return []
        names = ("EAX", "EBX", "ECX", "EDX")
        texts = [
            ", ".join(f"{name}={value:#x}" for name, value in zip(names, values, strict=True))
            for values in (one, two)
        ]
        expected = "the same answer whatever RAX[63:32] and the other registers hold"
        return [Mismatch("wrong-register", "answer", expected, f"{texts[0]}; or {texts[1]}")]

    def _wanted_accesses(self, native: Outcome, trapped: Outcome) -> tuple[Access, ...] | None:
        """Return what the device must see; None where native execution does not say.

        A handler may answer CPUID without its host; if it asks, then for that leaf.
        """
        if self._case.trap == "cpuid" and not trapped.accesses:
            return None
        if self._case.trap != "mmio":
            return native.accesses
        used = ix.InstructionInfoFactory().info(self._instruction).used_memory()
        window = (USER_BASE if self._lanes.gla < USER_HALF_END else KERNEL_BASE) + OPERAND_AT
        wanted = []
        for memory in used:
            size = ix.MemorySizeExt.size(memory.memory_size)
            if len(used) != 1 or memory.access not in {ix.OpAccess.READ, ix.OpAccess.WRITE}:
                return None
            offset = self._lanes.gla - window
            is_write = memory.access == ix.OpAccess.WRITE
            value = 0
            if is_write:
                value = int.from_bytes(native.memory[offset : offset + size], "little")
            wanted.append(Access("mmio", is_write, offset, size, value))
        if (
            self._case.crossing
            and wanted
            and wanted[0].address // PAGE != (wanted[0].address + wanted[0].size - 1) // PAGE
        ):
            return None
        return tuple(wanted)


def _shapes(accesses: tuple[Access, ...]) -> list[Access]:
    """Leave out the values of writes to memory."""
    return [each._replace(value=0) if each.what == "mmio" else each for each in accesses]


def _wrong_access(wanted: tuple[Access, ...], got: tuple[Access, ...]) -> Mismatch:
    return Mismatch("wrong-access", "", accesses_text(wanted), accesses_text(got))


def _beside_registers(native: Outcome, trapped: Outcome) -> list[Mismatch]:
    """Compare memory, stack, x87 and SSE."""
    found = []
    if native.memory != trapped.memory:
        found.append(memory_mismatch(native.memory, trapped.memory))
    if native.fpu != trapped.fpu:
        found.append(
            Mismatch(
                "wrong-register", FLOATS, "as the instruction leaves them",
                "other contents",
            )
        )  # fmt: skip
    if native.stack != trapped.stack:
        found.append(
            Mismatch("wrong-memory", "stack", "the stack above RSP as it was", "it changed")
        )
    return found
