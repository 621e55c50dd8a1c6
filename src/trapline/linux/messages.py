"""Lines that Linux prints on its console, and what they mean."""

import re
from typing import Final

# kernel/panic.c; the first may be preceded by a time stamp and a log level.
PANIC: Final = re.compile(rb"(?:^|\] )Kernel panic - not syncing: (.*)")
# Printed when all else is said: the guest now waits for ever, or for its reset.
PANIC_END: Final = re.compile(rb"---\[ end Kernel panic|(?:^|\] )Rebooting in \d+ seconds")

# kernel/reboot.c. On a hardware-reduced platform Linux resets through EFI only
# (efi_reboot_required(), arch/x86/platform/efi/quirks.c); without EFI it goes on to real mode,
# where a TD cannot go: the triple fault is the reset.
RESTART: Final = re.compile(rb"(?:^|\] )reboot: Restarting system")
# Where nothing can switch the machine off, as without ACPI, power off is a halt (v6.4).
HALT: Final = re.compile(rb"(?:^|\] )reboot: (?:System halted|Power off not available)")

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
