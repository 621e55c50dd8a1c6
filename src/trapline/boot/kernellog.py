"""What the guest's kernel says: from where it prints, whether a console shows it or not.

Where that cannot be watched (a kernel without symbols, a debugger that has the breakpoints), the
lines of its console have to do; a program in the guest can then speak in its name.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from trapline.boot.complaints import Complaints
from trapline.cpu.engine import Reg
from trapline.kernel.live.printk import MAX_FORMAT, Printk, read_string
from trapline.linux import messages
from trapline.linux.names import PRINTK
from trapline.machine.outcome import OutcomeKind

if TYPE_CHECKING:
    from trapline.kernel.binary import Binary
    from trapline.machine.machine import Machine
    from trapline.machine.observe.lastwords import Blame
    from trapline.machine.observe.symbols import GuestSymbols
    from trapline.results.boot import ComplaintKind
    from trapline.results.splat import Splat

# Linux waits for no more than 30 s (deferred_probe_timeout), but for its root device for ever.
SILENT_SECONDS: Final = 60
# What the kernel finds out when it looks at the clock, not by an exception.
_CLOCKED: "Final[frozenset[ComplaintKind]]" = frozenset({"soft-lockup", "hard-lockup", "rcu-stall"})


class KernelLog:
    """Tells the machine, and `complaints`, what the kernel says.

    `take` makes a splat that begins with a sentence.
    """

    def __init__(
        self,
        machine: "Machine",
        symbols: "GuestSymbols",
        take: "Callable[[str, Blame], Splat]",
    ) -> None:
        self._machine = machine
        self._take = take
        self._printk = Printk(machine.vcpu.read, lambda address: symbols.locate(address).label)
        self._has_init = False
        self.complaints = Complaints(self._seconds, self._complained)

    def line(self, line: bytes) -> None:
        """Take in a line of the console."""
        if not self._machine.hears_printk:
            self.complaints.message(line, None, lambda: line.decode("utf-8", "replace"))

    def breakpoints(self, vmlinux: "Binary", slide: int) -> dict[int, Callable[[], None]]:
        """Return what has to be called where for the kernel to be heard, from now on."""
        address = vmlinux.address_of(PRINTK)
        self._machine.hears_printk = address is not None
        if address is not None:
            self._wait()
        return {} if address is None else {address + slide: self._on_printk}

    def _on_printk(self) -> None:
        vcpu = self._machine.vcpu
        message = read_string(vcpu.read, int(vcpu.regs[Reg.RCX]), MAX_FORMAT)
        if message is None:
            return
        level, text = messages.unprefixed(message)
        arguments = int(vcpu.regs[Reg.R8])

        def said() -> str:
            return self._printk.text(text, arguments)

        self._look_for_init(text)
        self.complaints.message(text, level, said)
        self._machine.said(said().encode() if messages.PANIC.search(text) else text)

    def _look_for_init(self, message: bytes) -> None:
        """End a guest that says nothing for long before it has programs: it waits for something."""
        if not self._has_init:
            self._has_init = messages.INIT_STARTS.match(message) is not None
            if self._has_init:
                self._machine.host.end_never()
            else:
                self._wait()

    def _wait(self) -> None:
        machine = self._machine
        until = machine.vcpu.cycles + SILENT_SECONDS * machine.frequency
        machine.host.end_at(until, self._is_stuck)

    def _is_stuck(self) -> None:
        self._machine.host.end(
            OutcomeKind.HANG,
            f"The kernel said nothing for {SILENT_SECONDS} s of its time, and runs no init yet.",
        )

    def _complained(self, text: str, kind: "ComplaintKind") -> "Splat":
        return self._take(text, "event" if kind in _CLOCKED else "exception")

    def _seconds(self) -> float:
        return self._machine.vcpu.cycles / self._machine.frequency
