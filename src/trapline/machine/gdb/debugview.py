"""What gdb's `monitor` commands show of a TD: the `DebugTarget` of a running machine."""

from typing import TYPE_CHECKING

from trapline.base.printable import printable_ascii
from trapline.machine.observe.backtrace import backtrace
from trapline.results.splat import trace_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from trapline.cpu.engine import Vcpu
    from trapline.machine.observe.symbols import GuestSymbols


class TdTarget:
    """Answers for one TD. `vmlinux` is the file with its symbols, as gdb is to load it."""

    def __init__(
        self,
        vcpu: "Vcpu",
        symbols: "GuestSymbols",
        recent_traps: "Callable[[int], Sequence[str]]",
        vmlinux: "Path | None",
    ) -> None:
        # Building the table of inlined functions takes longer than gdb waits for a reply.
        symbols.preload()
        self._vcpu = vcpu
        self._symbols = symbols
        self._recent_traps = recent_traps
        self._vmlinux = vmlinux

    def backtrace(self) -> list[str]:
        """Walk the stack with ORC, which knows the way through exceptions where DWARF does not."""
        self._symbols.refresh()
        places, complete = backtrace(self._vcpu, self._symbols.runtime)
        lines = [printable_ascii(line) for place in places for line in trace_lines(place)]
        return lines if complete else [*lines, " (the stack makes no sense from here on)"]

    def recent_traps(self, count: int) -> "Sequence[str]":
        """Return a line for each of the last traps."""
        return self._recent_traps(count)

    def text_segment(self) -> int | None:
        """Return where the first segment of vmlinux runs, None while that is not known."""
        self._symbols.refresh()
        slide, linked = self._symbols.slide, self._symbols.first_segment
        return None if slide is None or linked is None else linked + slide

    def placement(self) -> list[str]:
        """Say where kernel and modules run, as commands that gdb takes."""
        self._symbols.refresh()
        slide = self._symbols.slide
        if slide is None:
            return ["the kernel does not run at its own addresses yet; ask again later"]
        lines = [f"slide {slide:#x}: run-time address = link-time address + slide"]
        if self._vmlinux is not None:
            lines.append(f"symbol-file {self._vmlinux} -o {slide:#x}")
        lines += [
            f"add-symbol-file {module.debug or module.path} {text:#x}"
            for module, text in self._symbols.module_text()
        ]
        return lines
