"""Names out of files nobody vouches for, made fit to print.

Section, symbol and type names end up in messages and reports. A hostile file must not send
line breaks or terminal escape sequences that way.
"""


def decode_name(raw: bytes) -> str:
    """Decode UTF-8; what is invalid or does not print comes out as a backslash escape."""
    text = raw.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
