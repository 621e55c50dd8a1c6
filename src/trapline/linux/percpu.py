"""Per-CPU variables that say what the kernel is doing, by their offset from its GS base."""

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from trapline.kernel.binary import Binary

_MASK: Final = (1 << 64) - 1
_KERNEL_HALF: Final = 1 << 63
# arch/x86/include/asm/preempt.h: a variable of its own before v6.2 (64701838bf05) and since v6.15
# (46e8fff6d45f), a member of pcpu_hot in between.
_VARIABLE: Final = "__preempt_count"
_HOT: Final = "pcpu_hot"
_HOT_MEMBER: Final = 8  # behind `current_task` (arch/x86/include/asm/current.h)


def preempt_count(vmlinux: "Binary", slide: int) -> int | None:
    """Return where preempt_count is, seen from the kernel's GS base; None if nothing says it.

    `slide` is KASLR's. Symbols of per-CPU variables are small numbers up to v6.14, addresses of the
    image since (9d7de2aa8b41), which move with it.
    """
    address = vmlinux.address_of(_VARIABLE)
    if address is None:
        hot = vmlinux.address_of(_HOT)
        address = None if hot is None else hot + _HOT_MEMBER
    if address is None:
        return None
    return address + slide & _MASK if address >= _KERNEL_HALF else address
