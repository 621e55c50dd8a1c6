"""All paths from a place in the kernel, until each has left it or meets one that was there before.

Both sides of a branch that is not decided, all forms of an alternative, static keys both ways.
Calls are followed while a trap may not land, and in entry code always; else a call is stepped
over. What cannot be followed becomes an edge of its own.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from iced_x86 import FlowControl, Mnemonic, OpKind, Register

from trapline.contexts import execute
from trapline.contexts.processor import (
    ENTRY_TOP,
    GENERAL,
    GS_KERNEL,
    KERNEL_TOP,
    RIP_KERNEL,
    RSP,
    Condition,
    Processor,
    Value,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from iced_x86 import Instruction

    from trapline.contexts.patching import PatchedCode
    from trapline.results.contexts import EdgeKind

M: Final = Mnemonic
FC: Final = FlowControl
_LEAVES: Final = {
    M.IRETQ: "IRET",
    M.IRETD: "IRET",
    M.SYSRETQ: "SYSRET",
    M.SYSRET: "SYSRET",
    M.SYSEXITQ: "SYSEXIT",
    M.SYSEXIT: "SYSEXIT",
    M.ERETU: "ERETU",
    M.ERETS: "ERETS",
}
_PATHS: Final = 20_000  # of one entry; the most that Linux has is a tenth of that
_REACH: Final = 4_000  # instructions in a gap of one entry; nobody would call more a gap


class Seen(NamedTuple):
    """One instruction in one kind of state."""

    conditions: tuple[Condition, ...]
    leaving: bool


class _Step(NamedTuple):
    """What is the same each time an instruction is met."""

    instruction: "Instruction"
    effect: execute.Effect
    next_ip: int
    is_straight: bool
    in_entry: bool
    static_key: int | None
    #: MOVs from memory and CMPs, from which the walk learns.
    teaches: bool


class Edge(NamedTuple):
    """Where a path goes on in a way that the walk does not follow, with the states' conditions."""

    address: int
    kind: "EdgeKind"
    target: int | None


@dataclass
class Walked:
    """What was found from one or more places.

    `gap` are the instructions that run while a trap may not land, with the states; `safe` those
    that ran otherwise. `edges` are what was not followed in the gap. `ends` counts the ways out.
    `paths` counts the paths that were walked, each up to where it leaves or joins another.
    `labels` are addresses that the kernel compares an interrupted RIP with.
    """

    gap: dict[int, set[Seen]] = field(default_factory=lambda: defaultdict(set))
    safe: set[int] = field(default_factory=set)
    edges: set[Edge] = field(default_factory=set)
    ends: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    paths: int = 0
    labels: set[int] = field(default_factory=set)

    def add(self, other: "Walked") -> None:
        """Take in what another walk found."""
        for address, states in other.gap.items():
            self.gap[address] |= states
        self.safe |= other.safe
        self.edges |= other.edges
        for way, count in other.ends.items():
            self.ends[way] += count
        self.paths += other.paths


#: Called with each instruction in a gap, before it is executed.
Look = Callable[["Instruction", Processor], None]


class Paths:
    """Walks one kernel. `look` sees each instruction in a gap; `bases` are `names.PERCPU_BASES`.

    `tops` are the per-CPU variables that say where a stack begins: the first from which RSP is
    loaded is the task's, as SYSCALL is walked first; the others are the entry stack's.
    """

    def __init__(self, code: "PatchedCode", bases: "Iterable[int]", look: Look) -> None:
        self.code = code
        self.bases = frozenset(bases)
        self.tops: dict[int, int] = {}
        self._look = look

    def walk(self, starts: "Iterable[Processor]") -> Walked:
        """Walk from all of these states."""
        return _Walk(self, self._look).run(starts)

    def states_at(self, place: int, starts: "Iterable[Processor]") -> list[Processor]:
        """Walk from these states and return those in which a place is reached, each once."""
        found: dict[tuple[object, ...], Processor] = {}

        def keep(instruction: "Instruction", state: Processor) -> None:
            if instruction.ip == place:
                found.setdefault(state.key(), state.copy())

        _Walk(self, keep).run(starts)
        return list(found.values())


class _Walk:
    """One walk: `pending` are states at which a path forked, `seen` those that were walked."""

    def __init__(self, paths: Paths, look: Look) -> None:
        self._tops = paths.tops
        self._code = paths.code
        self._bases = paths.bases
        self._look = look
        self._pending: list[tuple[Processor, bool]] = []
        self._seen: dict[int, set[object]] = defaultdict(set)
        self._steps: dict[int, _Step] = {}
        self.found = Walked()

    def run(self, starts: "Iterable[Processor]") -> Walked:
        """Walk until nothing is pending."""
        self._pending = [(state, False) for state in starts]
        self._pending.reverse()
        while self._pending:
            state, chosen = self._pending.pop()
            self.found.paths += 1
            if self.found.paths > _PATHS or len(self.found.gap) > _REACH:
                self.found.edges.add(Edge(state.ip, "too many paths", None))
                break
            self._follow(state, chosen)
        return self.found

    def _follow(self, state: Processor, chosen: bool) -> None:
        """Follow one path to its end, or to where another has been.

        `chosen`: the form of the alternative here is this one.
        """
        joins = True
        while True:
            if not chosen and (resumed := self._code.resume.get(state.ip)) is not None:
                state.ip = resumed
            if joins and not chosen:
                key = state.key()
                if key in self._seen[state.ip]:
                    return
                self._seen[state.ip].add(key)
            if not chosen and self._fork_forms(state):
                return
            chosen = False
            step = self._steps.get(state.ip) or self._step(state.ip)
            if step is None:
                self._edge(state, "no code", state.ip)
                return
            self._note(step, state)
            joins = not step.is_straight
            if step.is_straight:
                self._execute(step, state)
                state.ip = step.next_ip
            elif step.static_key is not None:
                self._pending.append((state.copy(step.static_key), False))
                state.ip = step.next_ip
            elif not self._branch(step.instruction, state):
                return

    def _step(self, address: int) -> _Step | None:
        instruction = self._code.decode(address)
        if instruction is None:
            return None
        key = self._code.static_keys.get(address)
        from_memory = instruction.mnemonic == M.MOV and instruction.op1_kind == OpKind.MEMORY
        step = self._steps[address] = _Step(
            instruction,
            execute.effect_of(instruction),
            instruction.next_ip,
            instruction.flow_control == FC.NEXT and key is None,
            self._code.in_entry(address),
            key,
            from_memory or instruction.mnemonic == M.CMP,
        )
        return step

    def _fork_forms(self, state: Processor) -> bool:
        forms = self._code.forms(state.ip, state.features)
        for form in reversed(forms):
            other = state.copy(form.address)
            other.features = dict(form.features)
            if form.direct:
                self._direct_call(state, other)
                continue
            self._pending.append((other, not form.is_empty))
        return bool(forms)

    def _direct_call(self, origin: Processor, state: Processor) -> None:
        """Call what the origin's operand, a member of pv_ops, points to in the image."""
        instruction = self._code.decode(origin.ip)
        target = None if instruction is None else self._pointer(instruction)
        if instruction is None or target is None:
            self._edge(origin, "paravirt call", None)
            return
        if self._call(origin.ip, instruction.next_ip, target, state):
            self._pending.append((state, False))

    # What is noted.

    def _conditions(self, state: Processor) -> tuple[Condition, ...]:
        return state.conditions(in_entry=self._code.in_entry(state.ip))

    def _note(self, step: _Step, state: Processor) -> None:
        conditions = state.conditions(in_entry=step.in_entry)
        if not conditions:
            state.was_safe = True
            self.found.safe.add(state.ip)
            return
        self.found.gap[state.ip].add(Seen(conditions, state.was_safe))
        self._look(step.instruction, state)

    def _edge(self, state: Processor, kind: "EdgeKind", target: int | None) -> None:
        """Note what is not followed, where that matters."""
        if self._conditions(state):
            self.found.edges.add(Edge(state.ip, kind, target))

    def _execute(self, step: _Step, state: Processor) -> None:
        instruction = step.instruction
        if not step.teaches:
            step.effect(instruction, state)
        elif instruction.mnemonic == M.CMP:
            self._learn_label(instruction, state)
            step.effect(instruction, state)
        else:
            self._learn_top(instruction, state)
            step.effect(instruction, state)
            if instruction.memory_displacement in self._bases:
                execute.put(state, instruction.op0_register, GS_KERNEL)

    def _learn_top(self, instruction: "Instruction", state: Processor) -> None:
        """Remember the per-CPU variable from which RSP is loaded."""
        if (
            instruction.op0_register != Register.RSP
            or instruction.segment_prefix != Register.GS
            or state.gs != GS_KERNEL
        ):
            return
        variable = execute.address(instruction, state)
        if variable is not None and variable not in self._tops:
            self._tops[variable] = ENTRY_TOP if self._tops else KERNEL_TOP

    def _learn_label(self, instruction: "Instruction", state: Processor) -> None:
        """Remember what an interrupted RIP is compared with."""
        pair = [execute.operand(instruction, number, state) for number in range(2)]
        if RIP_KERNEL in pair:
            pair.remove(RIP_KERNEL)
            if pair[0] is not None and self._code.in_entry(pair[0]):
                self.found.labels.add(pair[0])

    def _step_out(self, state: Processor) -> None:
        """Go to where the function of C that entry code called returns to.

        What it does once a trap may land again is no part of the gap.
        """
        assert state.rsp is not None, "a stack that is safe is known"
        calls = [
            at
            for at, after in sorted(state.frames.items())
            if at >= state.rsp and self._code.in_entry(after)
        ]
        if calls:
            state.rsp = calls[0]
            state.ip = state.frames[calls[0]]
            state.registers = [state.rsp + 8 if n == RSP else None for n in range(len(GENERAL))]
            state.after_call()

    # Where paths go on.

    def _branch(self, instruction: "Instruction", state: Processor) -> bool:
        """Go on behind a branch, call or return; False where the path ends."""
        flow = instruction.flow_control
        if instruction.mnemonic in _LEAVES:
            self.found.ends[_LEAVES[instruction.mnemonic]] += 1
            return False
        if flow == FC.CONDITIONAL_BRANCH:
            return self._conditional(instruction, state)
        if flow == FC.UNCONDITIONAL_BRANCH:
            return self._jump(instruction.near_branch_target, state)
        if flow == FC.CALL and instruction.op0_kind == OpKind.NEAR_BRANCH64:
            return self._call(
                instruction.ip, instruction.next_ip, instruction.near_branch_target, state
            )
        if flow == FC.RETURN:
            return self._return(state)
        if flow in {FC.INDIRECT_BRANCH, FC.INDIRECT_CALL}:
            return self._indirect(instruction, state)
        if flow in {FC.EXCEPTION, FC.INTERRUPT}:
            return self._exception(instruction, state)
        was_busy = state.ve_busy
        execute.execute(instruction, state)  # TDCALL, XBEGIN and the like
        state.ip = instruction.next_ip
        if was_busy and not self._conditions(state):
            self._step_out(state)
        return True

    def _conditional(self, instruction: "Instruction", state: Processor) -> bool:
        taken = execute.holds(instruction, state)
        target = instruction.near_branch_target
        if taken is None:
            other = state.copy()
            if self._jump(target, other):
                self._pending.append((other, False))
            state.ip = instruction.next_ip
            return True
        if taken:
            return self._jump(target, state)
        state.ip = instruction.next_ip
        return True

    def _jump(self, target: int, state: Processor) -> bool:
        if target == self._code.return_thunk:
            return self._return(state)
        if target in self._code.indirect_thunks:
            return self._go(execute.get(state, self._code.indirect_thunks[target]), state)
        if self._code.is_static_call(target):
            self._edge(state, "static call", target)
        is_report = target in self._code.reports
        leaves = self._code.in_entry(state.ip) and not self._code.in_entry(target)
        if is_report or (
            leaves and not self._conditions(state) and not self._is_helper(state.caller)
        ):
            if is_report:
                self._edge(state, "report", target)
            state.after_call()
            return self._return(state)
        state.ip = target
        return True

    def _call(self, site: int, after: int, target: int, state: Processor) -> bool:
        if target in self._code.indirect_thunks:
            value = execute.get(state, self._code.indirect_thunks[target])
            return self._call_value(after, value, state)
        if self._code.is_static_call(target):
            self._edge(state, "static call", target)
        unsafe = bool(state.conditions(in_entry=self._code.in_entry(site)))
        base = state.conditions(in_entry=False)
        follow = self._code.in_entry(target) or (bool(base) and unsafe) or self._is_helper(after)
        if target in self._code.reports:
            self._edge(state, "report", target)
            follow = False
        if not follow:
            state.after_call()
            return self._behind(site, after, state)
        state.enter(after)
        state.ip = target
        return True

    def _is_helper(self, after: int | None) -> bool:
        """Whether entry code takes a pointer from what returns to `after`.

        sync_regs() and fixup_bad_iret() say which stack to go on with; handlers do not.
        """
        if after is None or not self._code.in_entry(after):
            return False
        instruction = self._code.decode(after)
        return (
            instruction is not None
            and instruction.mnemonic == M.MOV
            and instruction.op1_register == Register.RAX
        )

    def _behind(self, site: int, after: int, state: Processor) -> bool:
        """Go on behind a call or trap; False where it is the last thing of its function."""
        state.ip = after
        return self._code.is_same_function(site, after)

    def _return(self, state: Processor) -> bool:
        return self._go(state.leave(), state, "return")

    def _indirect(self, instruction: "Instruction", state: Processor) -> bool:
        if instruction.op0_kind == OpKind.REGISTER:
            value = execute.get(state, instruction.op0_register)
        else:
            value = self._pointer(instruction, state)
        if instruction.flow_control == FC.INDIRECT_CALL:
            return self._call_value(instruction.next_ip, value, state)
        return self._go(value, state)

    def _call_value(self, after: int, value: Value, state: Processor) -> bool:
        if value is None:
            self._edge(state, "indirect call", None)
            site = state.ip
            state.after_call()
            return self._behind(site, after, state)
        return self._call(state.ip, after, value, state)

    def _go(self, value: Value, state: Processor, how: "EdgeKind" = "indirect jump") -> bool:
        """Go to an address that was computed or popped."""
        if value is None:
            self._edge(state, how, None)
            return False
        state.ip = value
        return True

    def _pointer(self, instruction: "Instruction", state: Processor | None = None) -> Value:
        """Read a pointer of the kernel's own data, as the image has it."""
        if instruction.is_ip_rel_memory_operand:
            address: Value = instruction.ip_rel_memory_address
        else:
            address = None if state is None else execute.address(instruction, state)
        if address is None:
            return None
        data = self._code.binary.read(address, 8)
        value = 0 if data is None else int.from_bytes(data, "little")
        return value if value and self._code.decode(value) is not None else None

    def _exception(self, instruction: "Instruction", state: Processor) -> bool:
        """UD2 of a WARN goes on behind itself; INT3 is what pads code."""
        self._edge(state, "exception", None)
        if instruction.mnemonic == M.INT3:
            return False
        return self._behind(instruction.ip, instruction.next_ip, state)
