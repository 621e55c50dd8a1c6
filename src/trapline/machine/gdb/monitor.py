"""The commands behind gdb's `monitor`: what gdb cannot know of a TD by itself."""

from typing import TYPE_CHECKING, Final, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

StopEvent = Literal["ve", "tdcall"]

_MAX_LINE: Final = 256
_MAX_OUTPUT: Final = 6000  # characters; a reply is one packet, in hexadecimal
_DEFAULT_TRAPS: Final = 16
_MAX_TRAPS: Final = 64

_HELP: Final = """\
monitor bt             back trace with ORC, through exceptions and stack switches
monitor kaslr          where the kernel runs, and the line that moves gdb's symbols there
monitor stop-on EVENT  stop when this happens: ve, tdcall, both, or none
monitor traps [COUNT]  the last traps of the guest, newest last
"""


class DebugTarget(Protocol):
    """What the stub asks of the machine it debugs, besides the engine."""

    def backtrace(self) -> "Sequence[str]":
        """Return the lines of a back trace from where the guest stands."""

    def recent_traps(self, count: int) -> "Sequence[str]":
        """Return a line for each of the last `count` traps, oldest first."""

    def placement(self) -> "Sequence[str]":
        """Say where the kernel runs, and how to tell gdb."""

    def text_segment(self) -> int | None:
        """Return where the first segment of vmlinux runs, None while that is not known."""


class Monitor:
    """Runs one command line and returns what gdb is to print."""

    @property
    def text_segment(self) -> int | None:
        """Where the first segment of vmlinux runs, None while that is not known."""
        return self._target.text_segment()

    def __init__(self, target: DebugTarget) -> None:
        self._target = target
        self.stop_on: frozenset[StopEvent] = frozenset()
        self._commands: dict[str, Callable[[list[str]], str]] = {
            "bt": lambda _: _lines(self._target.backtrace()),
            "kaslr": lambda _: _lines(self._target.placement()),
            "stop-on": self._stop_on,
            "traps": self._traps,
            "help": lambda _: _HELP,
        }

    def run(self, line: str) -> str:
        """Carry out one line. Never raises for what the user typed."""
        words = line[:_MAX_LINE].split()
        if not words:
            return _HELP
        command = self._commands.get(words[0])
        if command is None:
            return f"unknown command {words[0]!r}; try `monitor help`\n"
        output = command(words[1:])
        return output if len(output) <= _MAX_OUTPUT else output[:_MAX_OUTPUT] + "\n[cut]\n"

    def _stop_on(self, words: list[str]) -> str:
        choices: dict[str, frozenset[StopEvent]] = {
            "ve": frozenset({"ve"}),
            "tdcall": frozenset({"tdcall"}),
            "both": frozenset({"ve", "tdcall"}),
            "none": frozenset(),
        }
        if len(words) != 1 or words[0] not in choices:
            return "stop-on takes one of: ve, tdcall, both, none\n"
        self.stop_on = choices[words[0]]
        return f"stopping on: {words[0]}\n"

    def _traps(self, words: list[str]) -> str:
        count = _DEFAULT_TRAPS
        if words:
            if not words[0].isascii() or not words[0].isdecimal():
                return "traps takes a number\n"
            count = min(int(words[0]), _MAX_TRAPS)
        return _lines(self._target.recent_traps(count)) or "no traps yet\n"


def _lines(lines: "Sequence[str]") -> str:
    return "".join(f"{line}\n" for line in lines)
