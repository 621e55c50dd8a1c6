"""Text out of files nobody vouches for, made fit to print.

Names of sections, symbols, types, files and devices end up in messages and reports. A hostile
file must not send line breaks or terminal escape sequences that way. All text that goes out
passes `printable`, at the latest when it is written.
"""


def printable(text: str) -> str:
    r"""Write what does not print as a backslash escape: ESC as \x1b, a line break as \n.

    That is controls, line ends, what turns the direction of text, and bytes of a file name that
    are not UTF-8, which Python keeps as lone surrogates: byte 0xe9 becomes \udce9.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def printable_ascii(text: str) -> str:
    """Escape all that is not ASCII, too: what a mail can hold in any encoding."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isascii() and c.isprintable() else _escape(c) for c in text)


def encode_line(text: str) -> bytes:
    """Encode a line of a report for a mail: whatever is in it, nothing but its end breaks it."""
    return printable_ascii(text).encode("ascii") + b"\n"


def decode_name(raw: bytes) -> str:
    """Decode UTF-8; what is invalid or does not print comes out as a backslash escape."""
    return printable(raw.decode("utf-8", "backslashreplace"))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
