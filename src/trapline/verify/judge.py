"""Compares a trapped run with the native one, and the lanes with each other.

Nothing here knows what a kernel is likely to get wrong.
"""

from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import iced_x86 as ix

from trapline.verify.cases import Case
from trapline.verify.comparison import CPUID, Comparison
from trapline.verify.differences import (
    NO_OPERAND,
    Mismatch,
    accesses_text,
    ending_text,
    find_leaks,
    from_host,
    memory_mismatch,
    merge,
    symptom,
    without_consequences,
)
from trapline.verify.fixture import Outcome, Setup, Stage
from trapline.verify.inputs import (
    LANES,
    Lanes,
    Request,
    decode,
    lanes,
    memory_kinds,
    pattern,
    target_of,
)
from trapline.verify.testpages import KERNEL_BASE, OPERAND_AT, PAGE, USER_BASE, USER_HALF_END
from trapline.verify.world import GARBAGE, M64, World

if TYPE_CHECKING:
    from trapline.results.verify import Kind

Verdict = Literal[
    "same",  # the trapped run ends as the native one
    "same-fault",  # both end in the same exception
    "no-trap",  # the instruction did not trap: the TDX module or the CPU did it
    "refused",  # the handler refused, and nothing else happened
    "not-comparable",  # refused too, but the engine cannot execute it natively
    "flags",  # only flags differ
    "different",  # there are other mismatches
    "unreachable",  # no register state makes it reach the operand
]

_UNDEFINED: Final = "6"
_BMI: Final = frozenset((ix.CpuidFeature.BMI1, ix.CpuidFeature.BMI2))
_ZEROS: Final = 2  # the lane in which all that is no operand is zero
_STACK_SIZE: Final = 0x3400
_PORT: Final = 0x8182_8384_8586_8788
_MSR: Final = 0xF1F2_F3F4_95A6_B7C8


class Judgement(NamedTuple):
    """What came of one case."""

    verdict: Verdict
    mismatches: tuple[Mismatch, ...] = ()
    handled: bool = False  # the handler went on behind the instruction
    compared: bool = False  # and all of the state was compared
    executed: bool = False  # the engine has executed it natively
    may_refuse: bool = False  # a handler need not take this upon itself
    refused: bool = False  # the handler refused, whatever else happened
    injected: bool = False  # the #VE was made by hand
    value: int | None = None  # of the operand that is read from memory
    address: int | None = None  # of the operand in memory


class Judge:
    """Runs cases on a stage."""

    def __init__(self, stage: Stage, executed: frozenset[int] = frozenset()) -> None:
        self._stage = stage
        #: Forms of which it is known that the engine executes them.
        self.executed = executed

    def judge(self, case: Case) -> Judgement:
        """Run one case and compare."""
        return _Trial(self._stage, case, self.executed).judge()


class _Trial:
    """One case."""

    def __init__(self, stage: Stage, case: Case, executed: frozenset[int]) -> None:
        self._executed = executed
        self._stage = stage
        self._case = case
        self._pattern = pattern(case.seed)
        strict = decode(case.code, stage.end)
        self._valid = not strict.is_invalid
        self._instruction = decode(case.code, stage.end, strict=False)
        self._target = target_of(self._instruction)
        is_mmio = case.trap == "mmio"
        self._mmio = tuple(is_mmio and page != case.private for page in range(2))
        self._lanes: Lanes
        self._comparison: Comparison

    def judge(self) -> Judgement:
        case, stage = self._case, self._stage
        request = Request(
            stack=stage.stack_top,
            user=case.user,
            crossing=case.crossing,
            interrupts=case.interrupts,
            access_rights=case.user and not case.smap,
            pinned=case.pinned,
            base=USER_BASE if case.ring3 else KERNEL_BASE,
        )
        found = lanes(self._instruction, request, stage.segments, case.seed)
        if found is None:
            return Judgement("unreachable")
        self._lanes = found
        self._comparison = Comparison(case, self._instruction, self._target, found)
        if not self._valid:
            return Judgement("not-comparable")  # a processor raises #UD, without a trap
        native = stage.native(self._setup(0))
        if native.ending == "dead" or self._is_unknown(native):
            return self._judge_incomparable()._replace(may_refuse=True)
        return self._compare_runs(native)._replace(
            executed=native.ending == "done",
            may_refuse=native.ending != "done" or self._may_refuse(),
            value=self._value(),
            address=self._lanes.gla if self._case.trap == "mmio" else None,
        )

    def _value(self) -> int | None:
        """Return the operand that the instruction reads from memory."""
        used = ix.InstructionInfoFactory().info(self._instruction).used_memory()
        if self._case.trap != "mmio" or len(used) != 1 or used[0].access == ix.OpAccess.WRITE:
            return None
        at = (self._lanes.gla - OPERAND_AT) % PAGE
        size = ix.MemorySizeExt.size(used[0].memory_size)
        return int.from_bytes(self._pattern[at : at + size], "little")

    def _compare_runs(self, native: Outcome) -> Judgement:
        if self._case.rewritten:
            return self._judge_rewritten(native)
        trapped = self._stage.trapped(self._setup(0))
        verdict = self._verdict(native, trapped)
        if verdict is not None:
            return verdict
        return self._judge_handled(native, trapped)

    def _may_refuse(self) -> bool:
        """Whether a refusal is as good as an emulation, or better."""
        if self._case.trap != "mmio":
            return False
        offset = self._lanes.gla % PAGE
        size = ix.MemorySizeExt.size(self._instruction.memory_size)
        return (
            bool(self._case.rewritten)
            or self._case.ring3
            or self._lanes.gla < USER_HALF_END
            or offset + size > PAGE
        )

    # Building.

    def _setup(self, lane: int, *, garbage: int | None = None, code: bytes = b"") -> Setup:
        world = World(self._device_memory())
        world.port, world.msr, world.cpuid = _PORT, _MSR, CPUID
        return Setup(
            code or self._case.code,
            self._lanes.regs[lane],
            self._lanes.rflags[lane],
            self._pattern,
            _STACKS[lane],
            world,
            garbage,
            mmio=self._mmio,
        )

    def _device_memory(self) -> bytes:
        """Return what the device holds; where the guest's own memory is, something else."""
        if self._case.private is None:
            return self._pattern
        start = self._case.private * PAGE
        other = bytes(byte ^ 0xFF for byte in self._pattern[start : start + PAGE])
        return self._pattern[:start] + other + self._pattern[start + PAGE :]

    def _is_unknown(self, native: Outcome) -> bool:
        """Whether the engine does not know an instruction that processors do.

        It executes the vector forms of an instruction as its SSE form.
        """
        info = self._instruction.op_code()
        if info.encoding != ix.EncodingKind.LEGACY:
            return not _BMI.intersection(self._instruction.cpuid_features())
        return native.ending == "fault" and native.detail == _UNDEFINED

    # Verdicts.

    def _verdict(self, native: Outcome, trapped: Outcome) -> Judgement | None:
        """Judge by how the runs ended; None if both went on behind the instruction."""
        if native.ending == trapped.ending == "fault" and native.detail == trapped.detail:
            return Judgement("same-fault")
        if trapped.ending in {"dead", "hang"}:
            kind: Kind = "crash" if trapped.ending == "dead" else "hang"
            return _different(Mismatch(kind, trapped.detail, ending_text(native), trapped.detail))
        if not trapped.traps:
            return Judgement("no-trap")
        if trapped.ending == "refused":
            return self._judge_refusal(trapped)
        if trapped.ending == "fault":
            if native.ending == "fault" and native.detail == trapped.detail:
                return Judgement("same-fault")
            return _different(
                Mismatch("wrong-exception", "", ending_text(native), ending_text(trapped))
            )
        if native.ending == "fault":
            return _different(
                Mismatch("not-refused", "", ending_text(native), "the handler goes on behind it"),
                handled=True,
            )
        return None

    def _judge_refusal(self, trapped: Outcome) -> Judgement:
        """Judge a refusal, which must leave no trace at the host."""
        mismatches = []
        if trapped.accesses:
            mismatches.append(
                Mismatch("wrong-access", "refused", "no access", accesses_text(trapped.accesses))
            )
        # Not of INS: the engine writes zeros to its operand before it exits.
        if trapped.memory != self._pattern and self._case.trap == "mmio":
            mismatches.append(memory_mismatch(self._pattern, trapped.memory))
        verdict: Verdict = "different" if mismatches else "refused"
        return Judgement(verdict, tuple(mismatches), refused=True)

    def _judge_incomparable(self) -> Judgement:
        """Make it trap by hand, for the engine cannot decode it, and expect a refusal."""
        if (
            not memory_kinds(self._instruction)
            or self._case.rewritten
            # A prefix that the engine does not take: the form as such is compared.
            or self._instruction.code in self._executed
        ):
            return Judgement("not-comparable")
        used = ix.InstructionInfoFactory().info(self._instruction).used_memory()
        is_write = any(memory.access == ix.OpAccess.WRITE for memory in used)
        setup = self._setup(0)._replace(inject=self._lanes.gla, inject_write=is_write)
        trapped = self._stage.trapped(setup)
        if trapped.ending == "refused":
            judgement = self._judge_refusal(trapped)._replace(injected=True)
            clean = not judgement.mismatches
            return judgement._replace(verdict="not-comparable") if clean else judgement
        got = ending_text(trapped)
        if trapped.ending == "done":
            got = f"emulated as {accesses_text(trapped.accesses) or 'nothing'}"
        return _different(
            Mismatch("not-refused", "", "refused: it is no form that can be emulated", got),
            handled=True,
        )._replace(injected=True)

    def _judge_rewritten(self, native: Outcome) -> Judgement:
        """Either instruction may take effect, whole; or the handler refuses."""
        trapped = self._stage.trapped(self._setup(0)._replace(rewritten=self._case.rewritten))
        if trapped.ending == "refused":
            return self._judge_refusal(trapped)
        if trapped.ending in {"dead", "hang"}:
            return _different(Mismatch("crash", trapped.detail, "refused", trapped.detail))
        # What the handler makes of the new instruction when it was there from the start is for
        # that instruction's own cases to judge.
        other = self._setup(0, code=self._case.rewritten)
        effects = (
            native,
            self._stage.native(other),
            self._stage.trapped(other._replace(world=self._setup(0).world)),
        )
        if any(_same(each, trapped) for each in effects):
            return Judgement("same", handled=True)
        return _different(
            Mismatch(
                "not-refused",
                "",
                "the effect of the old or of the new instruction, or a refusal",
                f"neither; {accesses_text(trapped.accesses) or 'no access'}",
            ),
            handled=True,
        )

    def _judge_handled(self, native: Outcome, trapped: Outcome) -> Judgement:
        case = self._case
        found: list[Mismatch] = []
        if self._lanes.gla < USER_HALF_END and case.trap == "mmio":
            found.append(
                Mismatch(
                    "not-refused", "", "refused: the address is the user's",
                    accesses_text(trapped.accesses),
                )
            )  # fmt: skip
        found += self._comparison.compare(0, native, trapped)
        # Zeros are what an instruction that traps by itself is most likely to be tried with.
        for lane in (1,) if case.trap == "mmio" else (1, _ZEROS):
            found = self._try_lane(lane, trapped, found)
        found = without_consequences(found, trapped.calls)
        if not found:
            return Judgement("same", handled=True, compared=True)
        only_flags = all(mismatch.kind == "wrong-flags" for mismatch in found)
        verdict: Verdict = "flags" if only_flags else "different"
        return Judgement(verdict, tuple(found), handled=True, compared=True)

    def _try_lane(self, lane: int, first: Outcome, found: list[Mismatch]) -> list[Mismatch]:
        """Run it from another state, on a host that returns garbage where it may.

        Returns `found` with what is new.
        """
        native = self._stage.native(self._setup(lane))
        trapped = self._stage.trapped(self._setup(lane, garbage=self._garbage(lane)))
        known = {symptom(mismatch) for mismatch in found}
        of_lane = self._comparison.compare(lane, native, trapped)
        if lane == _ZEROS and not any(each.kind == "wrong-access" for each in of_lane):
            found = [
                each._replace(detail=NO_OPERAND) if each[:2] == ("wrong-access", "") else each
                for each in found
            ]
        leaks = find_leaks(first, trapped)
        answers = self._comparison.answers(first, trapped)
        if not leaks and not answers and {symptom(each) for each in of_lane} <= known:
            return found
        honest = self._stage.trapped(self._setup(lane))
        in_honest = self._comparison.compare(lane, native, honest)
        new = [*in_honest, *find_leaks(first, honest), *self._comparison.answers(first, honest)]
        known |= {symptom(mismatch) for mismatch in in_honest}
        new += [from_host(each) for each in of_lane if symptom(each) not in known]
        return merge(found, new)

    def _garbage(self, lane: int) -> int:
        """Return what differs in each bit from what the destination held.

        So a bit that the handler takes from the host is never the right one by chance.
        """
        number = next(iter(self._target.written), None)
        return GARBAGE if number is None else self._lanes.regs[lane][number] ^ M64


def _stack(lane: int) -> bytes:
    """Fill the stack, above RSP and where it is dead; the lanes share no byte."""
    if lane == _ZEROS:
        return bytes(_STACK_SIZE)
    return bytes((number * 7 + 3 ^ lane * 0xFF) & 0xFF for number in range(256)) * (
        _STACK_SIZE // 256
    )


_STACKS: Final = tuple(_stack(lane) for lane in range(LANES))


def _different(mismatch: Mismatch, *, handled: bool = False) -> Judgement:
    return Judgement("different", (mismatch,), handled)


def _same(native: Outcome, trapped: Outcome) -> bool:
    return (native.ending, native.detail, native.regs, native.memory) == (
        trapped.ending, trapped.detail, trapped.regs, trapped.memory,
    )  # fmt: skip
