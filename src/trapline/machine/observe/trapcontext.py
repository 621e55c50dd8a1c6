"""In which context each #VE came: what the processor and Linux's preempt_count say at it.

A boot takes some 20,000 #VEs, so that all is a few look-ups: registers, one word of memory.
"""

from collections import Counter
from typing import TYPE_CHECKING, Final

from trapline.cpu.engine import Reg
from trapline.results.boot import CONTEXTS

if TYPE_CHECKING:
    from trapline.cpu.engine import Vcpu
    from trapline.results.boot import TrapContext

_RFLAGS_IF: Final = 1 << 9
_MSR_GS_BASE: Final = 0xC000_0101
_KERNEL_HALF: Final = 1 << 63
_MASK: Final = (1 << 64) - 1
_RSP: Final = int(Reg.RSP)
# include/linux/preempt.h: serving a soft interrupt (SOFTIRQ_OFFSET), in a hard one (HARDIRQ_MASK).
_SOFTIRQ: Final = 1 << 8
_HARDIRQ: Final = 0xF << 16

_BIT: "Final[dict[TrapContext, int]]" = {name: 1 << n for n, name in enumerate(CONTEXTS)}
_USER_MODE: Final = _BIT["user mode"]
_EARLY: Final = _BIT["early"]
_IRQ_OFF: Final = _BIT["interrupts off"]
_SOFT: Final = _BIT["soft interrupt"]
_HARD: Final = _BIT["hard interrupt"]
_NMI: Final = _BIT["NMI"]
_AFTER: Final = _BIT["#VE handler"]
_PANIC: Final = _BIT["panic"]
_BEFORE: Final = _BIT["VE_INFO in use"]
_USER_GS: Final = _BIT["user GS"]
_USER_STACK: Final = _BIT["user stack"]


class TrapContexts:
    """Counts #VEs by exit reason and context.

    `is_early` until Linux sets up its gates, `is_panic` from its panic or double fault on.
    `preempt_count` is the offset of that variable from the kernel's GS base, once it is known.
    """

    def __init__(self, vcpu: "Vcpu") -> None:
        self._vcpu = vcpu
        self._ram = vcpu.memory.ram
        self._counts: dict[tuple[int, int], int] = {}
        self._places: dict[int, int] = {}  # of preempt_count in RAM, by GS base
        self.is_early = True
        self.is_panic = False
        self.preempt_count: int | None = None

    def note(self, reason: int, *, nested: bool, second: bool) -> None:
        """Count a #VE at the instruction that the VCPU is at.

        `nested`: the one before it is still being served; `second`: it was not even collected.
        """
        vcpu = self._vcpu
        bits = _USER_MODE if vcpu.cpl else self._in_kernel(vcpu)
        if vcpu.nmi_blocked:
            bits |= _NMI
        if second:
            bits |= _BEFORE
        elif nested:
            bits |= _AFTER
        if self.is_early:
            bits |= _EARLY
        if self.is_panic:
            bits |= _PANIC
        key = reason, bits
        self._counts[key] = self._counts.get(key, 0) + 1

    def _in_kernel(self, vcpu: "Vcpu") -> int:
        bits = 0 if vcpu.rflags & _RFLAGS_IF else _IRQ_OFF
        base = vcpu.msr(_MSR_GS_BASE)
        if base < _KERNEL_HALF:
            if not self.is_early:  # before, nobody but the kernel has set it
                bits |= _USER_GS
        elif self.preempt_count is not None:
            count = self._preempt_count(base)
            if count & _SOFTIRQ:
                bits |= _SOFT
            if count & _HARDIRQ:
                bits |= _HARD
        if vcpu.regs[_RSP] < _KERNEL_HALF and not self.is_early:
            bits |= _USER_STACK
        return bits

    def _preempt_count(self, base: int) -> int:
        assert self.preempt_count is not None, "asked for once it is known"
        place = self._places.get(base)
        if place is None:
            gpa = self._vcpu.translate(base + self.preempt_count & _MASK)
            place = -1 if gpa is None or gpa + 4 > len(self._ram) else gpa
            self._places[base] = place
        return 0 if place < 0 else int.from_bytes(self._ram[place : place + 4], "little")

    def counts(self) -> "dict[int, Counter[TrapContext]]":
        """Return #VEs by exit reason and context; one may count in several, or in none."""
        found: dict[int, Counter[TrapContext]] = {}
        for (reason, bits), count in self._counts.items():
            by_context = found.setdefault(reason, Counter())
            for name, bit in _BIT.items():
                if bits & bit:
                    by_context[name] += count
        return found
