"""The ways in which the processor enters a kernel, and the states in which it does.

Gates come from the kernel's tables, SYSCALL, SYSENTER and FRED from where the kernel writes their
MSRs. What an event leaves on the stack, and which stack it takes, is the processor's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from iced_x86 import FlowControl, Mnemonic, Register

from trapline.contexts import execute
from trapline.contexts.processor import (
    CR3_KERNEL,
    CR3_USER,
    CS_KERNEL,
    CS_USER,
    CS_USER32,
    ENTRY_TOP,
    GS_KERNEL,
    GS_USER,
    KERNEL_TOP,
    MASK,
    RIP_KERNEL,
    RIP_USER,
    RSP_USER,
    Processor,
    Value,
    ist_top,
)
from trapline.linux import idt, names

if TYPE_CHECKING:
    from trapline.contexts.patching import PatchedCode

Way = Literal["event", "syscall", "sysenter", "fred user", "fred kernel", "task", "early"]

NMI: Final = 2
VE: Final = 20
_DF: Final = 8
_VC: Final = 29
_INT80: Final = 0x80
_FIRST_DEVICE: Final = 32
_ERROR_CODE: Final = frozenset((8, 10, 11, 12, 13, 14, 17, 21, 29, 30))
_MIDDLE: Final = KERNEL_TOP - 0x2000  # of a task's stack, where an event meets the kernel
_WORD: Final = 8
_PT_REGS: Final = 21 * _WORD
_PT_REGS_CS: Final = 17 * _WORD
_EVENT_FRAME: Final = 0x40  # what an event takes of a stack, at most
# FRED: what stands above the frame's CS in the word of SS (Intel FRED specification 9.0, 5.2.1).
_FRED_VECTOR: Final = 32
_FRED_TYPE: Final = 48
_FRED_EXCEPTION: Final = 3
_FRED_KERNEL_OFFSET: Final = 0x100
_PAGE: Final = 0xFFF

_TITLES: Final = {
    "syscall": "SYSCALL",
    "syscall32": "SYSCALL of 32-bit code",
    "sysenter": "SYSENTER",
    "int80": "INT 0x80",
    "exceptions": "exceptions",
    "interrupts": "interrupts",
    "ve": "#VE",
    "ve-early": "early #VE",
    "nmi": "NMI",
    "mc": "#MC",
    "db": "#DB",
    "df": "#DF",
    "fred": "FRED",
    "fred-ve": "#VE by FRED",
    "task": "first return of a task",
}
_BY_VECTOR: Final = {1: "db", NMI: "nmi", _DF: "df", 18: "mc", VE: "ve", _INT80: "int80"}


_NO_ENTRY_TEXT: Final = (
    "Which code is entry code is not known, as there are no symbols for it; nothing was walked."
)


class Entry(NamedTuple):
    """Where the processor goes; `ist` is the number of the stack it takes there, 0 for none.

    `found` says how it was found. `early` is a gate of a table that another replaces.
    """

    address: int
    way: Way
    vector: int | None
    ist: int
    found: str
    early: bool = False


@dataclass
class Group:
    """Entries that have a gap in common."""

    id: str
    entries: list[Entry] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What it is called."""
        return _TITLES[self.id]


@dataclass(frozen=True)
class Hardware:
    """All entries of a kernel by group, in the order in which they are to be walked.

    `missing` says, in sentences, what should be there and was not found.
    """

    groups: tuple[Group, ...]
    missing: tuple[str, ...]

    @classmethod
    def of(cls, code: "PatchedCode") -> "Hardware":
        """Find the entries of a kernel."""
        if not code.entry_text:
            return cls((), (_NO_ENTRY_TEXT,))
        groups = {name: Group(name) for name in _TITLES}
        for name, entry in _entries(code):
            groups[name].entries.append(entry)
        missing = []
        if not groups["syscall"].entries:
            missing.append("What MSR_LSTAR is set to was not found, so SYSCALL is not there.")
        if all(entry.way != "event" for group in groups.values() for entry in group.entries):
            missing.append("No table of gates was found, so no interrupt or exception is there.")
        return cls(tuple(group for group in groups.values() if group.entries), tuple(missing))


def _entries(code: "PatchedCode") -> Iterator[tuple[str, Entry]]:
    yield from _by_msr(code)
    gates = idt.gates(code.binary)
    on_ist = {gate.address for gate in gates if gate.ist}
    for gate in gates:
        name = _BY_VECTOR.get(gate.vector)
        if gate.vector == _VC:
            continue  # AMD's; nothing in a TD raises it
        if name is None:
            name = "exceptions" if gate.vector < _FIRST_DEVICE else "interrupts"
        early = not gate.ist and gate.address in on_ist
        yield name, Entry(gate.address, "event", gate.vector, gate.ist, "IDT table", early)
    for name, address in idt.stub_arrays(code.binary).items():
        yield "interrupts", Entry(address, "event", None, 0, f"each stub of {name}")
    yield from _by_name(code)


def _by_name(code: "PatchedCode") -> Iterator[tuple[str, Entry]]:
    for name in names.NEW_TASK:
        address = code.binary.address_of(name)
        if address is not None and code.binary.section_at(address):
            yield "task", Entry(address, "task", None, 0, f"symbol {name}")
            break
    array, behind = (code.binary.address_of(name) for name in names.EARLY_GATES)
    if array is not None and behind is not None and behind > array:
        stub = array + VE * ((behind - array) // _FIRST_DEVICE)
        yield "ve-early", Entry(stub, "early", VE, 0, f"symbol {names.EARLY_GATES[0]}")


def _by_msr(code: "PatchedCode") -> Iterator[tuple[str, Entry]]:
    ways: dict[int, tuple[str, Way]] = {
        idt.MSR_LSTAR: ("syscall", "syscall"),
        idt.MSR_CSTAR: ("syscall32", "syscall"),
        idt.MSR_SYSENTER_EIP: ("sysenter", "sysenter"),
    }
    for msr, values in sorted(_entry_points(code).items(), reverse=True):
        for value in values:
            if msr in ways:
                name, way = ways[msr]
                yield name, Entry(value, way, None, 0, f"written to MSR {msr:#x}")
                continue
            page = value & ~_PAGE
            user: tuple[int, Way] = (page, "fred user")
            kernel: tuple[int, Way] = (page + _FRED_KERNEL_OFFSET, "fred kernel")
            for address, by in (user, kernel):
                yield "fred", Entry(address, by, None, 0, f"written to MSR {msr:#x}")
                yield "fred-ve", Entry(address, by, VE, 0, f"written to MSR {msr:#x}")


def _entry_points(code: "PatchedCode") -> dict[int, tuple[int, ...]]:
    """Find the code addresses that are written to each MSR of `idt.ENTRY_MSRS`.

    By WRMSR, or by a call with the number as its first argument: native_write_msr(), pv_ops.
    """
    found: dict[int, set[int]] = {msr: set() for msr in idt.ENTRY_MSRS}
    for span in idt.functions_with_entry_msrs(code.binary):
        for msr, value in _written(code, span):
            known = found.get(msr)
            if known is not None and code.decode(value & ~_PAGE) and code.decode(value):
                known.add(value)
    return {msr: tuple(sorted(values)) for msr, values in found.items()}


def _written(code: "PatchedCode", span: range) -> Iterator[tuple[int, int]]:
    """Give each (MSR, value) that a function writes, where both are constants.

    The two are loaded right before, so the code is taken in the order in which it stands.
    """
    state = Processor(span.start, [None] * 16, None, None, None, {})
    address = span.start
    while address in span and (instruction := code.decode(address)) is not None:
        address = instruction.next_ip
        flow = instruction.flow_control
        is_call = flow in {FlowControl.CALL, FlowControl.INDIRECT_CALL}
        if instruction.mnemonic == Mnemonic.WRMSR:
            pair = Register.ECX, Register.EAX, Register.EDX
        elif is_call:
            pair = Register.EDI, Register.RSI, Register.RDX
        else:
            if flow in {FlowControl.UNCONDITIONAL_BRANCH, FlowControl.RETURN}:
                state.registers = [None] * 16
            else:
                execute.execute(instruction, state)
            continue
        number, low, high = (execute.get(state, register) for register in pair)
        value = _whole(low, high)
        if number is not None and value is not None:
            yield number, value
        if is_call:
            state.after_call()


def _whole(low: Value, high: Value) -> Value:
    """Put a value together; the upper half of what is given whole is in it already."""
    if low is None:
        return None
    if low >> 32 or high is None:
        return low
    return (low | high << 32) & MASK


class Starts:
    """Makes the states in which a kernel is entered.

    `tops` is what they share; `page_table` the features that decide whether the kernel's own page
    table is only loaded there: each start is made with and without them, if there are any.
    """

    def __init__(self, tops: dict[int, int], page_table: frozenset[int]) -> None:
        self._tops = tops
        self._page_table = page_table
        self._isolation = (True, False) if page_table else (False,)

    def of(self, entry: Entry) -> list[Processor]:
        """Give all states in which this entry is reached."""
        make = {
            "event": self._event,
            "syscall": self._syscall,
            "sysenter": self._sysenter,
            "fred user": self._fred,
            "fred kernel": self._fred,
            "task": self._task,
            "early": self._early,
        }[entry.way]
        return [state for isolated in self._isolation for state in make(entry, isolated)]

    def of_function(self, address: int) -> list[Processor]:
        """Give the states in which ordinary code of the kernel calls a function."""
        entry = Entry(address, "task", None, 0, "a function")
        return [state for isolated in self._isolation for state in self._task(entry, isolated)]

    def _state(self, ip: int, gs: int, isolated: bool, *, user_pages: bool) -> Processor:
        other = GS_KERNEL if gs == GS_USER else GS_USER
        cr3 = CR3_USER if isolated and user_pages else CR3_KERNEL
        state = Processor(ip, [None] * 16, gs, other, cr3, self._tops)
        state.features = dict.fromkeys(self._page_table, isolated)
        return state

    def _syscall(self, entry: Entry, isolated: bool) -> Iterator[Processor]:
        state = self._state(entry.address, GS_USER, isolated, user_pages=True)
        state.rsp = RSP_USER
        yield state

    def _sysenter(self, entry: Entry, isolated: bool) -> Iterator[Processor]:
        state = self._state(entry.address, GS_USER, isolated, user_pages=True)
        state.rsp = ENTRY_TOP
        yield state

    def _event(self, entry: Entry, isolated: bool) -> Iterator[Processor]:
        if not entry.early:
            for selector in (CS_USER, CS_USER32):
                state = self._state(entry.address, GS_USER, isolated, user_pages=True)
                state.rsp = ist_top(entry.ist) if entry.ist else ENTRY_TOP
                deliver(state, entry, selector, RIP_USER, RSP_USER)
                yield state
        stacks = [_MIDDLE]
        if entry.vector == NMI:
            # One that comes while the code of another runs on the same stack.
            stacks.append(ist_top(entry.ist) - _EVENT_FRAME)
        for gs in (GS_KERNEL, GS_USER) if entry.ist else (GS_KERNEL,):
            for user_pages in (False, True) if entry.ist and isolated else (False,):
                for stack in stacks:
                    state = self._state(entry.address, gs, isolated, user_pages=user_pages)
                    state.rsp = ist_top(entry.ist) if entry.ist else stack
                    deliver(state, entry, CS_KERNEL, RIP_KERNEL, stack)
                    yield state

    def _early(self, entry: Entry, isolated: bool) -> Iterator[Processor]:
        if not isolated:
            state = self._state(entry.address, GS_KERNEL, isolated, user_pages=False)
            state.rsp = _MIDDLE
            deliver(state, entry, CS_KERNEL, RIP_KERNEL, _MIDDLE)
            yield state

    def _fred(self, entry: Entry, isolated: bool) -> Iterator[Processor]:
        """FRED delivers on a stack of the kernel's, and exchanges GS itself; no page table does."""
        if isolated:
            return
        state = self._state(entry.address, GS_KERNEL, isolated, user_pages=False)
        is_user = entry.way == "fred user"
        state.rsp = KERNEL_TOP if is_user else _MIDDLE
        state.push(None)  # reserved
        state.push(None)  # event data
        event = None
        if entry.vector is not None:
            selector = 0x2B if is_user else 0x18
            event = selector | entry.vector << _FRED_VECTOR | _FRED_EXCEPTION << _FRED_TYPE
        state.push(event)
        state.push(RSP_USER if is_user else _MIDDLE)
        state.push(None)
        state.push(CS_USER if is_user else CS_KERNEL)
        state.push(RIP_USER if is_user else RIP_KERNEL)
        state.push(0)
        state.ve_busy = entry.vector == VE
        yield state

    def _task(self, entry: Entry, isolated: bool) -> Iterator[Processor]:
        state = self._state(entry.address, GS_KERNEL, isolated, user_pages=False)
        state.rsp = KERNEL_TOP - _PT_REGS
        state.store(state.rsp + _PT_REGS_CS, _WORD, CS_USER)
        yield state


def deliver(state: Processor, entry: Entry, selector: int, rip: int, rsp: Value) -> None:
    """Push an event's frame, as the IDT has it, and note what the event holds."""
    if state.rsp is not None:
        state.rsp &= ~0xF
    state.push(None)  # SS
    state.push(rsp)
    state.push(None)  # RFLAGS
    state.push(selector)
    state.push(rip)
    if entry.vector in _ERROR_CODE:
        state.push(None)
    # A double fault is handled on its own stack wherever it comes from; it does not go back.
    state.from_user = rip == RIP_USER and entry.vector != _DF
    state.ve_busy = entry.vector == VE
    state.nmi = entry.vector == NMI
