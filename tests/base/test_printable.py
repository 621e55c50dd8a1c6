"""Text that goes out drives no terminal and breaks no line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.base.printable import decode_name, encode_line, printable, printable_ascii


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é", "plain é"),
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("one\ntwo\rthree\ttab", "one\\ntwo\\rthree\\ttab"),
        ("\x9b31m", "\\x9b31m"),
        ("caf\udce9.ko", "caf\\udce9.ko"),
        ("\u202ekcatta", "\\u202ekcatta"),
        ("\u2028", "\\u2028"),
    ],
)
def test_what_does_not_print_is_escaped(text, shown):
    assert printable(text) == shown


def test_ascii_is_for_mail():
    assert printable_ascii("é\x1b") == "\\xe9\\x1b"


@given(st.text() | st.text(st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF)))
def test_any_text(text):
    assert printable(text).isprintable()
    assert printable_ascii(text).isascii()
    assert encode_line(text).decode().endswith("\n")
    assert encode_line(text).count(b"\n") == 1


@given(st.binary())
def test_any_bytes(raw):
    assert decode_name(raw).isprintable()
