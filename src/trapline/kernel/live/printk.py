"""What a kernel is about to print, read where it does: at the entry of vprintk_emit().

    int vprintk_emit(int facility, int level, const struct dev_printk_info *dev_info,
                     const char *fmt, va_list args)        (kernel/printk/printk.c)

The format string says which message it is, whatever its arguments are. The memory is a guest's:
each read may fail, and lengths are bounded.
"""

import re
import struct
from collections.abc import Callable
from typing import Final

MAX_FORMAT: Final = 512
MAX_STRING: Final = 256
_PAGE: Final = 4096
# What one conversion can ask for: arguments, width, precision.
_MAX_WIDTH: Final = 64
# struct __va_list_tag of the System V ABI for x86-64, 3.5.7.
_VA_LIST: Final = struct.Struct("<IIQQ")
_GENERAL_END: Final = 48
_WORD: Final = struct.Struct("<Q")
_CONVERSION: Final = re.compile(
    r"%(?P<flags>[-+ #0]*)(?P<width>\*|\d+)?(?:\.(?P<precision>\*|\d+))?"
    r"(?P<size>hh|h|ll|l|z|t|L)?(?P<kind>[diuxXocsp%])(?P<more>(?<=p)[A-Za-z0-9]*)?"
)
_BITS: Final = {"hh": 8, "h": 16, "l": 64, "ll": 64, "z": 64, "t": 64, "L": 64}
_SYMBOLIC: Final = frozenset("SsBb")  # %pS and its kin (Documentation/core-api/printk-formats.rst)

ReadMemory = Callable[[int, int], bytes | None]


def read_string(read: ReadMemory, address: int, limit: int = MAX_STRING) -> bytes | None:
    """Read a string up to its NUL, or `limit` bytes of it; None where there is no memory."""
    text = b""
    while len(text) < limit:
        size = min(limit - len(text), _PAGE - address % _PAGE)
        data = read(address, size) if address >= 0 and address + size <= 1 << 64 else None
        if data is None:
            return text or None
        part, end, _ = data.partition(b"\0")
        text += part
        if end:
            break
        address += size
    return text


class Printk:
    """Formats as the kernel would; `label` turns an address into what %pS prints."""

    def __init__(self, read: ReadMemory, label: Callable[[int], str]) -> None:
        self._read = read
        self._label = label

    def text(self, message: bytes, arguments: int) -> str:
        """Format a message with the va_list at `arguments`; "?" for what cannot be read."""
        values = _Arguments(self._read, arguments)
        return _CONVERSION.sub(
            lambda found: self._one(found, values), message.decode("utf-8", "replace")
        ).strip("\n")

    def _one(self, found: re.Match[str], values: "_Arguments") -> str:
        kind, flags = found["kind"], found["flags"]
        if kind == "%":
            return "%"
        width = self._number(found["width"], values)
        precision = self._number(found["precision"], values)
        value = values.next()
        if value is None:
            return "?"
        text = self._convert(value, kind, found["size"], found["more"] or "", precision)
        if "#" in flags and kind in "xX":
            text = "0x" + text
        if "-" in flags:
            return text.ljust(width or 0)
        return text.rjust(width or 0, "0" if "0" in flags else " ")

    def _convert(
        self, value: int, kind: str, size: str | None, more: str, precision: int | None
    ) -> str:
        if kind == "s":
            string = read_string(self._read, value, MAX_STRING if precision is None else precision)
            return "(null)" if string is None else string.decode("utf-8", "replace")
        if kind == "p":
            return self._label(value) if more[:1] in _SYMBOLIC and more else f"{value:016x}"
        if kind == "c":
            return chr(value & 0xFF)
        bits = _BITS.get(size or "", 32)
        value &= (1 << bits) - 1
        if kind in "di" and value >> bits - 1:
            value -= 1 << bits
        return f"{value:{kind if kind in 'xXo' else 'd'}}"

    @staticmethod
    def _number(text: str | None, values: "_Arguments") -> int | None:
        if text is None:
            return None
        number = values.next() if text == "*" else int(text)
        return None if number is None else min(number & 0xFFFFFFFF, _MAX_WIDTH)


class _Arguments:
    """The words of a va_list, one after the other; None where there is no memory."""

    def __init__(self, read: ReadMemory, address: int) -> None:
        self._read = read
        data = self._bytes(address, _VA_LIST.size)
        self._general, self._stack, self._saved = _GENERAL_END, 0, 0
        if data is not None:
            self._general, _, self._stack, self._saved = _VA_LIST.unpack(data)

    def next(self) -> int | None:
        """Return the next argument, as the 64 bits that it was passed in."""
        if self._general < _GENERAL_END:
            address = self._saved + self._general
            self._general += _WORD.size
        else:
            address = self._stack
            self._stack += _WORD.size
        data = self._bytes(address, _WORD.size)
        return None if data is None else int(_WORD.unpack(data)[0])

    def _bytes(self, address: int, size: int) -> bytes | None:
        data = self._read(address, size) if address > 0 and address + size <= 1 << 64 else None
        return data if data is not None and len(data) == size else None
