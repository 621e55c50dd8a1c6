"""What a kernel may not do on its way, though the end may look as it should.

Of each trap that the host or the module delivers it is remembered what was interrupted, until
the IRET that goes back there. In between

- no interrupt is delivered, if the interrupted code had interrupts off;
- an NMI may come inside an NMI (the IRET of a #VE in its handler unblocks them) only in a kernel
  that is built for it: its frame is pushed over that of the first, so that the first can go
  back only by a copy. Whether there is one is seen by the frame that its IRET takes;
- VE_INFO is collected, or the next #VE is a double fault;
- what was interrupted in the kernel gets back the registers that it had. That is looked at in the
  runs that are looked at closely (`Way.skim`), as each IRET takes time.

And no page of kernel text or read-only data that the page tables protect is written, whatever is
in it at the end: the engine's log of pages written tells.

Exceptions that the guest's own instructions raise are not followed.
"""

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from trapline.cpu.engine import Reg, Vcpu
from trapline.explore.datamap import PAGE, fixed_ranges
from trapline.explore.gates import Gate
from trapline.explore.window import LiveWindow
from trapline.kernel.live.runtime import KERNEL_MAP

_VECTOR_NMI: Final = 2
_VECTOR_VE: Final = 20
_NAMES: Final = {_VECTOR_NMI: "NMI", _VECTOR_VE: "#VE", 18: "#MC"}
_VEINFO_GET: Final = 3  # leaf of TDCALL
_RFLAGS_IF: Final = 1 << 9
# What a handler must give back: status flags, IF, DF, IOPL, NT, AC; not the debugger's RF and TF.
_FLAGS: Final = 0x47ED5
_GIVEN_BACK: Final = tuple(reg for reg in Reg if reg not in (Reg.RIP, Reg.RSP))
_CPL: Final = 3
# What IRETQ pops: RIP, CS, RFLAGS, RSP, SS (SDM 3A, 7.14.2); frames are aligned to 16 bytes.
_FRAME: Final = struct.Struct("<5Q")
_ALIGNMENT: Final = 16
_ISTS: Final = struct.Struct("<36x7Q")  # of the TSS (SDM 3A, 9.7)
# Page table entries.
_ADDRESS: Final = 0xFFFFFFFFFF000
_PRESENT, _WRITABLE, _LARGE = 1, 2, 0x80
_LA57: Final = 1 << 12  # of CR4


class Trap(NamedTuple):
    """A trap that is being handled: what it interrupted.

    `frame` is where its frame was pushed, on a stack of its own (IST), or None; `overrun` is
    where a later NMI came whose frame was pushed there, too.
    """

    vector: int
    rip: int
    rsp: int
    cpl: int
    rflags: int
    frame: int | None
    overrun: int | None = None
    registers: tuple[int, ...] | None = None  # those that it must get back

    @property
    def has_interrupts(self) -> bool:
        """Whether the interrupted code had interrupts on."""
        return bool(self.rflags & _RFLAGS_IF)

    def is_left_for(self, rsp: int, cpl: int) -> bool:
        """Whether an IRET to this stack pointer goes back to what was interrupted.

        A handler may change it by a word, to emulate an instruction that pushes or pops.
        """
        if _CPL in (cpl, self.cpl):
            return cpl == self.cpl
        if self.frame is not None:
            return abs(rsp - self.rsp) <= _ALIGNMENT
        return (self.rsp & -_ALIGNMENT) - _FRAME.size < rsp <= self.rsp + _ALIGNMENT


class Underway(NamedTuple):
    """The traps being handled that matter, the innermost last, and the last NMI, over or not.

    NMIs and interrupts are among the first only in runs that are looked at closely, and NMIs where
    one came inside another: following each to its IRET would cost time in every run.
    """

    open: tuple[Trap, ...] = ()
    nmi: Trap | None = None


class Way:
    """Watches the way of one window's runs. Make it at the window's start.

    What it returns is a sentence on what went wrong, None where nothing did. `traps` are part of
    the state of a run.
    """

    def __init__(self, window: LiveWindow) -> None:
        self._window = window
        self._vcpu: Vcpu = window.vcpu
        self._module = window.machine.module
        self._frames: dict[int, int | None] = {}  # by vector
        first = self._opened()
        is_nmi = first is not None and first.vector == _VECTOR_NMI
        self._first = Underway(
            () if first is None or is_nmi else (first,), first if is_nmi else None
        )
        self._protected: frozenset[int] | None = None  # pages
        self.begin()

    def begin(self, traps: Underway | None = None) -> None:
        """Begin a run: at the window's start, or where these traps were being handled."""
        self.traps = self._first if traps is None else traps
        self._is_told = True  # of each page written
        self._skims = False
        self.is_in_doubt = False
        self._arm()

    def skim(self) -> None:
        """Save the time that it takes to see each IRET, for the rest of this run.

        Traps then are not known to be over. Where that matters the run ends `is_in_doubt`, and is
        to be done again without.
        """
        self._skims = True
        self._arm()

    def close(self) -> None:
        """Watch no longer."""
        self._vcpu.watch_iret(wanted=False)

    def deliver(self, vector: int, *, is_interrupt: bool) -> str | None:
        """Note that an event is about to be delivered."""
        vcpu = self._vcpu
        if vcpu.cpl == _CPL and self.traps.open:
            self._open(())
        if is_interrupt:
            off = self._with_interrupts_off()
            if off is None:
                self._follow(self._trap(vector))
                return None
            self.is_in_doubt = self._skims
            return (
                f"Vector {vector:#x} is delivered inside the handling of the "
                f"{_name(off.vector)} at {self._label(off.rip)}, which had interrupts off."
            )
        trap = self._trap(vector)
        if vector == _VECTOR_NMI:
            if self._is_on(trap.frame):
                first = self._interrupted(vector, trap.frame)
                if self._skims:
                    self.is_in_doubt = True
                    return "An NMI came inside an NMI."
                if first is not None:
                    others = (one for one in self.traps.open if one[:3] != first[:3])
                    self._open((*others, first._replace(overrun=trap.rip), trap))
            else:
                self._follow(trap)
            self.traps = self.traps._replace(nmi=trap)
        elif vector == _VECTOR_VE or not trap.has_interrupts:
            self._open((*self.traps.open, trap))
        return None

    def tdcall(self, leaf: int) -> None:
        """Note a TDCALL that was served: VE_INFO may be free."""
        if self.traps.open and leaf == _VEINFO_GET and self._module.ve_info is None:
            self._open(
                tuple(
                    one
                    for one in self.traps.open
                    if one.vector != _VECTOR_VE or not one.has_interrupts
                )
            )

    def announced(self) -> None:
        """Note that the host or the module may have written any page."""
        self._is_told = False

    def iret(self) -> str | None:
        """Look at an IRET that is about to execute."""
        at = int(self._vcpu.regs[Reg.RSP])
        data = self._vcpu.read(at, _FRAME.size)
        if data is None:
            return None  # it faults
        rip, cs, rflags, rsp, _ = _FRAME.unpack(data)
        left = self._left(rsp, cs & _CPL)
        if left is None:
            lost = next((one for one in self.traps.open if one.overrun and one.frame == at), None)
            if lost is None:
                return None
            assert lost.overrun is not None
            return (
                f"An NMI at {self._label(lost.overrun)} came inside the NMI at "
                f"{self._label(lost.rip)}, and its frame took the place of the first one's: the "
                f"IRET goes back to {self._label(rip)}."
            )
        closed = self.traps.open[left:]
        self._open(self.traps.open[:left])
        if any(one.vector == _VECTOR_VE for one in closed) and self._module.ve_info is not None:
            trap = next(one for one in reversed(closed) if one.vector == _VECTOR_VE)
            return (
                f"The handling of the #VE at {self._label(trap.rip)} ends with VE_INFO not "
                "collected: the next #VE is a #DF."
            )
        return self._given_back(closed[0], rflags) if cs & _CPL == 0 else None

    def _given_back(self, trap: Trap, rflags: int) -> str | None:
        """Look at what the kernel gets back from a trap whose IRET is about to execute."""
        back = f"The {_name(trap.vector)} at {self._label(trap.rip)} goes back with"
        if (rflags ^ trap.rflags) & _FLAGS:
            return f"{back} RFLAGS {rflags & _FLAGS:#x}, {trap.rflags & _FLAGS:#x} expected."
        if trap.registers is not None:
            for reg, was in zip(_GIVEN_BACK, trap.registers, strict=True):
                now = int(self._vcpu.regs[reg])
                if now != was:
                    return f"{back} {reg.name} {now:#x}, {was:#x} expected."
        return None

    def end(self) -> str | None:
        """Look at a run that is at the compare point; the first is the reference."""
        pages = self._window.pages_written()
        if self._protected is None:
            # What the reference run writes is the kernel's own affair.
            self._protected = frozenset(self._find_protected()).difference(pages)
            return None
        if self._is_told and not self._protected.isdisjoint(pages):
            gpa = min(self._protected.intersection(pages))
            what = self._label(gpa - self._window.target.physical_base + KERNEL_MAP)
            return f"{self._what(gpa)} is written, in the page of {what}."
        valid = self._module.ve_info is not None
        if valid and not self._window.last_step.conditions.ve_valid:
            self.is_in_doubt = self._skims
            return "VE_INFO is not collected at the compare point: the next #VE is a #DF."
        return None

    def _arm(self) -> None:
        self._vcpu.watch_iret(wanted=bool(self.traps.open) and not self._skims)

    def _follow(self, trap: Trap) -> None:
        """Follow an NMI or an interrupt to its IRET, in a run that is looked at closely."""
        if not self._skims:
            registers = tuple(int(self._vcpu.regs[reg]) for reg in _GIVEN_BACK)
            self._open((*self.traps.open, trap._replace(registers=registers)))

    def _open(self, traps: tuple[Trap, ...]) -> None:
        self.traps = self.traps._replace(open=traps)
        self._arm()

    def _with_interrupts_off(self) -> Trap | None:
        """Return a trap being handled whose interrupted code had interrupts off."""
        off = next((one for one in reversed(self.traps.open) if not one.has_interrupts), None)
        nmi = self.traps.nmi
        if off is None and nmi is not None and not nmi.has_interrupts:
            # While NMIs are blocked no IRET was executed.
            return nmi if self._vcpu.nmi_blocked or self._is_on(nmi.frame) else None
        return off

    def _is_on(self, frame: int | None) -> bool:
        """Whether the guest runs on the stack, as far as a page, that a frame is pushed to."""
        rsp = int(self._vcpu.regs[Reg.RSP])
        return frame is not None and frame & -PAGE < rsp <= frame + _FRAME.size

    def _left(self, rsp: int, cpl: int) -> int | None:
        """Find which of the open traps an IRET goes back from; those inside are over, too."""
        if cpl == _CPL:
            return 0 if self.traps.open else None
        for index in range(len(self.traps.open) - 1, -1, -1):
            if self.traps.open[index].is_left_for(rsp, cpl):
                return index
        return None

    def _trap(self, vector: int) -> Trap:
        """Describe the trap that a delivery before the instruction at hand makes."""
        vcpu = self._vcpu
        return Trap(
            vector,
            int(vcpu.regs[Reg.RIP]),
            int(vcpu.regs[Reg.RSP]),
            vcpu.cpl,
            vcpu.rflags,
            self._frame(vector),
        )

    def _ist_frame(self, ist: int) -> int | None:
        data = self._vcpu.read(self._vcpu.segment("tr").base, _ISTS.size)
        if data is None or not ist:
            return None
        return (int(_ISTS.unpack(data)[ist - 1]) & -_ALIGNMENT) - _FRAME.size

    def _opened(self) -> Trap | None:
        """Return the trap whose handler begins where the window does."""
        opening = self._window.opening
        vector = _VECTOR_NMI if opening.post == "nmi" else _VECTOR_VE
        if opening.post != "nmi" and opening.scenario.start.trap is None:
            return None
        return self._interrupted(vector, int(self._vcpu.regs[Reg.RSP]))

    def _interrupted(self, vector: int, at: int | None) -> Trap | None:
        """Describe a trap by the frame that was pushed for it."""
        data = None if at is None else self._vcpu.read(at, _FRAME.size)
        if data is None:
            return None
        rip, cs, rflags, rsp, _ = _FRAME.unpack(data)
        frame = self._frame(vector)
        return Trap(vector, rip, rsp, cs & _CPL, rflags, frame)

    def _frame(self, vector: int) -> int | None:
        """Return where a vector's frame is pushed, if it has a stack of its own."""
        if vector not in self._frames:
            gate = Gate.read(self._vcpu, vector)
            self._frames[vector] = None if gate is None else self._ist_frame(gate.ist)
        return self._frames[vector]

    # Read-only memory.

    def _find_protected(self) -> Iterator[int]:
        """Yield the GPAs of pages with what is fixed, and that may not be written."""
        for where in fixed_ranges(self._window.target).values():
            yield from unwritable(self._vcpu, where)

    def _what(self, gpa: int) -> str:
        address = gpa - self._window.target.physical_base + KERNEL_MAP
        ranges = fixed_ranges(self._window.target)
        what = next((name for name, where in ranges.items() if address in where), "memory")
        return what[0].upper() + what[1:]

    def _label(self, address: int) -> str:
        is_user = address < 1 << 63
        return self._window.target.symbols.locate(address, is_user=is_user).label


def unwritable(vcpu: Vcpu, where: range) -> Iterator[int]:
    """Yield GPAs of the pages of a range of GLAs that CR3 maps, and lets nobody write."""
    at = where.start & -PAGE
    while at < where.stop:
        gpa, size, is_writable = _leaf(vcpu, at)
        end = min((at & -size) + size, where.stop)
        if gpa is not None and not is_writable:
            start = gpa & ~vcpu.memory.shared_bit
            yield from range(start, start + (end - at), PAGE)
        at = (at & -size) + size


def _leaf(vcpu: Vcpu, gla: int) -> tuple[int | None, int, bool]:
    """Walk the page tables: the GPA of a GLA (None: not mapped), what size is mapped, and how."""
    ram = vcpu.memory.ram
    table, rights = vcpu.cr(3) & _ADDRESS, _WRITABLE
    levels = 5 if vcpu.cr(4) & _LA57 else 4
    for level in range(levels, 0, -1):
        size = PAGE << 9 * (level - 1)
        at = table + (gla // size % 512) * 8
        entry = int.from_bytes(ram[at : at + 8], "little")
        rights &= entry
        if not entry & _PRESENT:
            return None, size, False
        if level == 1 or (level < 4 and entry & _LARGE):
            return (entry & _ADDRESS & -size) + gla % size, size, bool(rights & _WRITABLE)
        table = entry & _ADDRESS & ~vcpu.memory.shared_bit
    raise AssertionError


def _name(vector: int) -> str:
    return _NAMES.get(vector, f"vector {vector:#x}")
