"""Where the guest's serial output goes: kept, hashed, shown live, and bounded.

A guest may print for ever. The console keeps the first part of what it prints (enough for
the panic message of any guest that is not out to fill memory), hashes all of
it, and calls `on_limit` once when the byte limit is passed.
"""

from collections.abc import Callable
from hashlib import blake2b

# Bytes. A verbose boot prints about 100 KiB; a guest that prints for ever passes this within
# minutes, before any other bound ends it.
DEFAULT_LIMIT = 4 << 20
KEEP = 4 << 20  # bytes kept for the result

Echo = Callable[[bytes], None]


class Console:
    """A sink for serial output.

    `echo` gets whole lines, or what there is at `show` and `flush`; `on_line` gets each line
    without its line end. Lines are cut at 4 KiB.
    """

    MAX_LINE = 4096

    def __init__(
        self,
        *,
        echo: Echo | None = None,
        on_line: Callable[[bytes], None] | None = None,
        limit: int = DEFAULT_LIMIT,
        on_limit: Callable[[], None] | None = None,
    ) -> None:
        self._echo = echo
        self._on_line = on_line
        self._limit = limit
        self._on_limit = on_limit
        self._hash = blake2b(digest_size=16)
        self._line = bytearray()
        self._shown = 0  # bytes of the line that `echo` has
        self._kept = bytearray()
        self.written = 0

    def put(self, byte: int) -> None:
        """Take one byte from the transmitter."""
        self.written += 1
        line = self._line
        line.append(byte)
        if byte == 0x0A or len(line) >= self.MAX_LINE:
            self._end_line()
        if self.written == self._limit + 1 and self._on_limit is not None:
            self._on_limit()

    def show(self) -> None:
        """Have `echo` get what there is of a line, which may go on."""
        if self._echo is not None and len(self._line) > self._shown:
            self._echo(bytes(self._line[self._shown :]))
            self._shown = len(self._line)

    def flush(self) -> None:
        """Pass on an unfinished line, such as a prompt."""
        if self._line:
            self._end_line()

    def _end_line(self) -> None:
        line = bytes(self._line)
        self._line.clear()
        self._hash.update(line)
        if len(self._kept) < KEEP:
            self._kept += line[: KEEP - len(self._kept)]
        if self._echo is not None and len(line) > self._shown:
            self._echo(line[self._shown :])
        self._shown = 0
        if self._on_line is not None:
            self._on_line(line.rstrip(b"\r\n"))

    @property
    def kept(self) -> bytes:
        """The first `KEEP` bytes."""
        return bytes(self._kept) + bytes(self._line)

    @property
    def digest(self) -> str:
        """BLAKE2b-128 of all bytes so far, in hexadecimal."""
        whole = self._hash.copy()
        whole.update(self._line)
        return whole.hexdigest()
