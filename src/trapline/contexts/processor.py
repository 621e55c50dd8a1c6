"""What the walk knows of the processor at one point of one path.

What the kernel's entry code decides by gets a number that stands for its kind: the bases of the
user's and the kernel's GS, the two page tables, a place on each stack, the address that an event
interrupted. All else is unknown, and a branch on what is unknown goes both ways. So the code is
executed, not matched: SWAPGS, MOV to CR3, RDMSR and the copies of a frame do what they do.
"""

from dataclasses import dataclass, field
from typing import Final, Literal

from iced_x86 import Register

#: A known 64-bit number, or None.
Value = int | None
Stack = Literal["kernel", "entry", "ist", "user", "none"]
Condition = Literal[
    "user stack",
    "no stack",
    "entry stack",
    "IST stack",
    "user GS",
    "user CR3",
    "VE_INFO in use",
    "NMI entry",
]
MASK: Final = (1 << 64) - 1

# Numbers that stand for their kind. Nothing in a kernel compares them with others of their kind
# but in ways that come out the same for all: a sign, a bit, which stack.
GS_USER: Final = 0x0000_7F00_0000_0000
GS_KERNEL: Final = 0xFFFF_8881_0000_0000
CR3_KERNEL: Final = 0x0123_4000
CR3_USER_BITS: Final = 0x1800  # PTI_USER_PCID_BIT, PTI_USER_PGTABLE_BIT (arch/x86/mm/pti.c)
CR3_USER: Final = CR3_KERNEL | CR3_USER_BITS
CR3_USER_PAGES: Final = 0x1000
RIP_USER: Final = 0x0000_0000_0040_1000
#: Below where a kernel is linked: an instruction of the kernel that no label names.
RIP_KERNEL: Final = 0xFFFF_FFFF_8000_0010
RSP_USER: Final = 0x0000_7FFC_0000_8000
KERNEL_TOP: Final = 0xFFFF_C900_0001_0000
ENTRY_TOP: Final = 0xFFFF_FE00_0000_2000
_IST_BASE: Final = 0xFFFF_FE00_0010_0000
_IST_SIZE: Final = 0x1_0000
_ISTS: Final = 8
_STACKS: Final[tuple[tuple[Stack, int, int], ...]] = (
    ("kernel", KERNEL_TOP - 0x1_0000, KERNEL_TOP),
    ("entry", ENTRY_TOP - 0x1000, ENTRY_TOP),
    ("ist", _IST_BASE, _IST_BASE + _ISTS * _IST_SIZE),
    ("user", RSP_USER - 0x4000, RSP_USER + 0x3FFF),
)
CS_KERNEL: Final = 0x10
CS_USER: Final = 0x33
CS_USER32: Final = 0x23
SELECTORS: Final = frozenset((CS_KERNEL, CS_USER, CS_USER32))
_USER_RPL: Final = 3

GENERAL: Final = tuple(
    getattr(Register, name) for name in ("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI")
) + tuple(getattr(Register, f"R{number}") for number in range(8, 16))
RSP: Final = GENERAL.index(Register.RSP)
_CLOBBERED: Final = tuple(
    GENERAL.index(getattr(Register, name))
    for name in ("RAX", "RCX", "RDX", "RSI", "RDI", "R8", "R9", "R10", "R11")
)
_ARGUMENTS: Final = tuple(
    GENERAL.index(getattr(Register, name)) for name in ("RDI", "RSI", "RDX", "RCX", "R8", "R9")
)
#: ZF, SF, CF, OF, PF.
Flags = tuple[bool | None, bool | None, bool | None, bool | None, bool | None]
UNKNOWN_FLAGS: Final[Flags] = (None, None, None, None, None)


def ist_top(number: int) -> int:
    """Return where the stack of that number in the TSS begins."""
    return _IST_BASE + number * _IST_SIZE


@dataclass(slots=True)
class Processor:
    """One state.

    `cells` is memory by address, in words of eight bytes; `frames` are the return addresses of
    functions that are being executed, by where they are on the stack.
    `gs` and `other_gs` are what SWAPGS exchanges. `features` are the CPU features that this path
    has decided on, by number. `from_user` is whether user mode was interrupted, `was_safe` whether
    the way in is over. `tops` are the per-CPU
    variables that say where a stack begins, by address; all states of a kernel share them.
    """

    ip: int
    registers: list[Value]
    gs: Value
    other_gs: Value
    cr3: Value
    tops: dict[int, int]
    ve_busy: bool = False
    nmi: bool = False
    flags: Flags = UNKNOWN_FLAGS
    cells: dict[int, int] = field(default_factory=dict)
    frames: dict[int, int] = field(default_factory=dict)
    features: dict[int, bool] = field(default_factory=dict)
    from_user: bool = False
    was_safe: bool = False

    def copy(self, ip: int | None = None) -> "Processor":
        """Return one that goes on elsewhere."""
        return Processor(
            self.ip if ip is None else ip,
            list(self.registers),
            self.gs,
            self.other_gs,
            self.cr3,
            self.tops,
            self.ve_busy,
            self.nmi,
            self.flags,
            dict(self.cells),
            dict(self.frames),
            dict(self.features),
            self.from_user,
            self.was_safe,
        )

    def key(self) -> tuple[object, ...]:
        """Return what makes two states the same."""
        return (
            *self.registers,
            self.gs,
            self.other_gs,
            self.cr3,
            self.ve_busy,
            self.nmi,
            self.flags,
            frozenset(self.cells.items()),
            frozenset(self.frames.items()),
            frozenset(self.features.items()),
            self.from_user,
            self.was_safe,
        )

    @property
    def rsp(self) -> Value:
        """The stack pointer."""
        return self.registers[RSP]

    @rsp.setter
    def rsp(self, value: Value) -> None:
        self.registers[RSP] = value

    @property
    def stack(self) -> Stack:
        """Which stack RSP is on; "none" where it holds something else, or what is not known."""
        rsp = self.rsp
        if rsp is not None:
            for name, first, last in _STACKS:
                if first <= rsp <= last:
                    return name
        return "none"

    def conditions(self, *, in_entry: bool) -> tuple[Condition, ...]:
        """Say why a trap may not land here; nothing where it may.

        `in_entry` is whether this is entry code, in which an NMI's frame is where the next NMI
        would put its own.
        """
        found: list[Condition] = []
        stack = self.stack
        if stack == "user":
            found.append("user stack")
        elif stack == "none":
            found.append("no stack")
        elif stack == "entry":
            found.append("entry stack")
        elif stack == "ist" and self.from_user:
            # What comes from user mode goes on on the task's stack; the next event of its kind
            # would find this one in use.
            found.append("IST stack")
        if self.gs != GS_KERNEL:
            found.append("user GS")
        if self.cr3 is None or self.cr3 & CR3_USER_PAGES:
            found.append("user CR3")
        if self.ve_busy:
            found.append("VE_INFO in use")
        if self.nmi and in_entry and stack == "ist":
            found.append("NMI entry")
        return tuple(found)

    def load(self, address: int, size: int) -> Value:
        """Return `size` bytes of memory."""
        if address in self.tops and size == 8:
            return self.tops[address]
        offset = address & 7
        word = self.cells.get(address - offset)
        if word is None or offset + size > 8:
            return None
        return word >> 8 * offset & (1 << 8 * size) - 1

    def store(self, address: int, size: int, value: Value) -> None:
        """Change `size` bytes of memory."""
        offset = address & 7
        base = address - offset
        if offset + size > 8:
            self.cells.pop(base, None)
            self.cells.pop(base + 8, None)
            return
        if size == 8:
            known: Value = 0
        else:
            known = self.cells.get(base)
        if value is None or known is None:
            self.cells.pop(base, None)
            return
        mask = (1 << 8 * size) - 1 << 8 * offset
        self.cells[base] = known & ~mask | value << 8 * offset & mask

    def push(self, value: Value) -> None:
        """PUSH eight bytes."""
        if self.rsp is None:
            return
        self.rsp = self.rsp - 8 & MASK
        self.store(self.rsp, 8, value)

    def pop(self) -> Value:
        """POP eight bytes."""
        if self.rsp is None:
            return None
        value = self.load(self.rsp, 8)
        self.rsp = self.rsp + 8 & MASK
        return value

    def enter(self, after: int) -> None:
        """CALL: return to `after`."""
        self.push(after)
        if self.rsp is not None:
            self.frames[self.rsp] = after

    def leave(self) -> Value:
        """RET: say where to, which a function that was stepped over has not changed."""
        at = self.rsp
        value = self.pop()
        frame = None if at is None else self.frames.pop(at, None)
        return frame if value is None else value

    @property
    def caller(self) -> Value:
        """Where RET would go to from here."""
        if self.rsp is None:
            return None
        value = self.load(self.rsp, 8)
        return self.frames.get(self.rsp) if value is None else value

    def after_call(self) -> None:
        """Forget what a function of C that was called may have changed.

        It leaves the stack pointer and the registers that the ABI has it leave, changes what its
        arguments point to and lies behind that, and does not turn a frame of user mode into one
        of the kernel.
        """
        rsp = self.rsp
        pointers = [
            value
            for number in _ARGUMENTS
            if (value := self.registers[number]) is not None and rsp is not None and value >= rsp
        ]
        changed = min(pointers, default=MASK)
        for number in _CLOBBERED:
            self.registers[number] = None
        self.flags = UNKNOWN_FLAGS
        self.cells = {
            address: value
            for address, value in self.cells.items()
            if rsp is not None and address >= rsp and (address < changed or value in SELECTORS)
        }

    def interrupted_user(self) -> bool:
        """Whether the frame at the stack pointer, as IRET takes it, is one of user mode."""
        selector = None if self.rsp is None else self.load(self.rsp + 8, 8)
        return selector is not None and selector & _USER_RPL == _USER_RPL
