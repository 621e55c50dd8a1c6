"""What Linux prints, and what it means.

A message is known by its format string, which is the kernel's own: whatever a program writes, to
the console or to /dev/kmsg, comes with another. Where formats cannot be seen, lines of the console
have to do. The patterns fit both: `%d` where a line has a number.
"""

import re
from typing import Final, NamedTuple

from trapline.results.boot import ComplaintKind

# kernel/panic.c; the first may be preceded by a time stamp and a log level.
PANIC: Final = re.compile(rb"(?:^|\] )Kernel panic - not syncing: (.*)")
# Printed when all else is said: the guest now waits for ever, or for its reset.
PANIC_END: Final = re.compile(rb"---\[ end Kernel panic|(?:^|\] )Rebooting in (?:%d|\d+) seconds")

# kernel/reboot.c. On a hardware-reduced platform Linux resets through EFI only
# (efi_reboot_required(), arch/x86/platform/efi/quirks.c); without EFI it goes on to real mode,
# where a TD cannot go: the triple fault is the reset.
RESTART: Final = re.compile(rb"(?:^|\] )reboot: Restarting system")
# Where nothing can switch the machine off, as without ACPI, power off is a halt (v6.4).
HALT: Final = re.compile(rb"(?:^|\] )reboot: (?:System halted|Power off not available)")

# kernel_init(), init/main.c: from here on there are programs, which may well be silent.
INIT_STARTS: Final = re.compile(rb"Run %s as init process")

# How far a boot came: milestone -> the line that tells.
LINES: Final = (
    (
        "decompressor's first message",
        re.compile(rb"^(early console in extract_kernel|Decompressing|(Physical )?KASLR disabled)"),
    ),
    ("kernel banner", re.compile(rb"Linux version \d")),
    ("TDX detected", re.compile(rb"tdx: Guest detected")),
    ("/init started", re.compile(rb"Run \S*init as init process")),
    ("self-test passed", re.compile(rb"^init: self-test passed")),
    (
        "power off",
        re.compile(rb"reboot: (Power down|Restarting system|System halted|Power off not)"),
    ),
)

# A time stamp, with CONFIG_PRINTK_CALLER who it was, and the pr_fmt() of some who complain.
_LINE_HEAD: Final = re.compile(rb"(?:\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? )?")
_COMPLAINER: Final = rb"(?:rcu: |watchdog: |NMI watchdog: |traps: )?"
# include/linux/kern_levels.h: SOH, and a digit or "c" for a continued line.
_LEVEL: Final = re.compile(rb"\x01(.)")
_ERROR: Final = 3

_LOCKDEP: Final = (
    rb"WARNING: (?:possible (?:circular|recursive|irq) |inconsistent lock state|suspicious RCU"
    rb"|bad (?:unlock|contention)|held lock freed|lock held when|\S+-safe -> |Nested lock )"
)
_WORDS: Final[tuple[tuple[ComplaintKind, bytes], ...]] = (
    # __warn(), kernel/panic.c: up to v6.17 with CPU and PID first. kernel/locking/lockdep.c and
    # lib/ubsan.c print their own.
    ("warning", rb"WARNING: (?:CPU: \S+ PID: \S+ at |\S+:\S+ at |at )"),
    ("warning", _LOCKDEP),
    ("warning", rb"UBSAN: "),
    # __die_header(), arch/x86/kernel/dumpstack.c; "Oops: " in front of all since v6.11.
    ("oops", rb"Oops: |.+: (?:%04lx|[0-9a-f]{4}) \[#(?:%d|\d+)\]"),
    # Said before the oops: show_fault_oops(), handle_stack_overflow(), exc_double_fault(),
    # fred_bad_type().
    ("oops", rb"BUG: (?:unable to handle |kernel NULL pointer |.+ stack guard page was hit)"),
    ("oops", rb"(?:BUG|PANIC): (?:double fault|invalid or fatal FRED event)"),
    ("soft-lockup", rb"BUG: soft lockup "),
    ("hard-lockup", rb".*[Ww]atchdog detected hard LOCKUP"),
    ("rcu-stall", rb"INFO: \S+ (?:self-)?detected (?:expedited )?stall"),
    ("hung-task", rb"INFO: task .+ blocked.* for more than "),
    ("bug", rb"kernel BUG at |BUG: "),
)
_COMPLAINTS: Final = tuple((kind, re.compile(_COMPLAINER + words)) for kind, words in _WORDS)
# Those of which the oops itself is yet to be printed.
_FORERUNNER: Final = re.compile(_COMPLAINER + rb"(?:kernel BUG at |BUG: |PANIC: )")
_DIE_HEADER: Final = re.compile(rb"Oops: |.+ \[#(?:%d|\d+)\]")


class Complaint(NamedTuple):
    """`is_forerunner`: a line of the same oops follows, which `is_oops` tells."""

    kind: ComplaintKind
    is_forerunner: bool
    is_oops: bool


def unprefixed(message: bytes) -> tuple[int | None, bytes]:
    """Take the level off a format string; the level is None where it names none."""
    found = _LEVEL.match(message)
    if found is None:
        return None, message
    return (int(found[1]) if found[1].isdigit() else None), message[found.end() :]


def complaint(message: bytes, level: int | None = None) -> Complaint | None:
    """Say what a format string, or a line of the console, complains of; None for others.

    `level` is the message's, 0 to 7, None where it is not known.
    """
    text = message[_LINE_HEAD.match(message).end() :]  # type: ignore[union-attr]  # matches nothing
    for kind, pattern in _COMPLAINTS:
        if pattern.match(text):
            if kind == "bug" and level is not None and level > _ERROR:
                return None
            is_oops = kind == "oops" and _DIE_HEADER.match(text) is not None
            ahead = kind in {"oops", "bug"} and not is_oops and _FORERUNNER.match(text) is not None
            return Complaint(kind, ahead, is_oops)
    return None
