"""Reading numbers and strings from debug sections without running over their end."""

from typing import Final

from trapline.base.errors import BadImageError
from trapline.base.printable import decode_name

_MAX_LEB: Final = 10  # bytes of a 64-bit number
_MAX_STRING: Final = 1 << 14


class Cursor:
    """A position in a section. Reading past the end is a BadImageError that names `what`."""

    def __init__(
        self, data: memoryview | bytes, what: str, position: int = 0, end: int | None = None
    ) -> None:
        self._data = memoryview(data)
        self._what = what
        self.position = position
        self.end = len(self._data) if end is None else end
        if not 0 <= position <= self.end <= len(self._data):
            raise self.bad()

    def bad(self) -> BadImageError:
        """Return the error for contents that make no sense at this position."""
        return BadImageError(f"{self._what} is corrupt or cut off.")

    def skip(self, size: int) -> None:
        """Step over bytes."""
        if size < 0 or self.position + size > self.end:
            raise self.bad()
        self.position += size

    def unsigned(self, size: int) -> int:
        """Read a little-endian number of `size` bytes."""
        start = self.position
        self.skip(size)
        return int.from_bytes(self._data[start : self.position], "little")

    def signed(self, size: int) -> int:
        """Read a little-endian two's complement number of `size` bytes."""
        start = self.position
        self.skip(size)
        return int.from_bytes(self._data[start : self.position], "little", signed=True)

    def uleb(self) -> int:
        """Read an unsigned LEB128 number (DWARF 5, 7.6)."""
        value, _ = self._leb()
        return value

    def sleb(self) -> int:
        """Read a signed LEB128 number."""
        value, bits = self._leb()
        return value - (1 << bits) if value >> (bits - 1) else value

    def string(self) -> str:
        """Read a string that ends with NUL."""
        limit = min(self.end, self.position + _MAX_STRING)
        text, nul, _ = bytes(self._data[self.position : limit]).partition(b"\0")
        if not nul:
            raise self.bad()
        self.position += len(text) + 1
        return decode_name(text)

    def _leb(self) -> tuple[int, int]:
        value = 0
        for number in range(_MAX_LEB):
            byte = self.unsigned(1)
            value |= (byte & 0x7F) << 7 * number
            if byte < 0x80:
                return value, 7 * (number + 1)
        raise self.bad()
