"""The guest's console on the user's terminal, live, with nothing in it that drives a terminal."""

from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

# What a terminal may get from a guest: printable ASCII, line ends and tabs. All else, escape
# sequences above all, becomes a question mark.
_ALLOWED: Final = frozenset((*range(0x20, 0x7F), 0x09, 0x0A, 0x0D))
_TABLE: Final = bytes(byte if byte in _ALLOWED else ord("?") for byte in range(256))


class Screen:
    """Passes on the lines of a console."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def __call__(self, data: bytes) -> None:
        """Show some output at once."""
        self._stream.write(data.translate(_TABLE))
        self._stream.flush()


def plain(stream: IO[bytes]) -> "Callable[[bytes], None]":
    """Pass on what a program prints: to a terminal as `Screen` does, elsewhere as it is."""
    if stream.isatty():
        return Screen(stream)

    def write(data: bytes) -> None:
        stream.write(data)
        stream.flush()

    return write
