import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.base.printable import printable_ascii
from trapline.report.formats.layout import WIDTH, paragraph, table
from trapline.report.words import counted


def test_numbers_stand_right_and_texts_left():
    assert list(table(("name", "sites"), [("a", 1), ("bcdef", 1138)])) == [
        "name   sites",
        "-----  -----",
        "a          1",
        "bcdef  1,138",
    ]


def test_no_rows_no_table():
    assert list(table(("name",), [])) == []


def test_the_widest_text_column_wraps():
    lines = list(table(("id", "why"), [("1af4:1000", "word " * 30)]))
    assert max(map(len, lines)) <= WIDTH
    assert len(lines) > 3
    assert " ".join(lines[2:]).split() == ["1af4:1000", *["word"] * 30]


@given(
    st.lists(
        st.tuples(st.text(max_size=200), st.text(max_size=200), st.integers(0, 10**9)), max_size=5
    )
)
def test_never_wider_than_a_mail_and_never_a_control_character(rows):
    for line in table(("first", "second", "count"), rows):
        assert len(line) <= WIDTH
        assert line.isascii()
        assert line.isprintable()


@given(st.text(max_size=400))
def test_paragraphs_fit_too(text):
    for line in paragraph(text, indent="- ", hanging="  "):
        assert len(line) <= WIDTH
        assert printable_ascii(line) == line


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("readl", "readl"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb", "a\\nb"),
        ("ü", "\\xfc"),
        ("\udcff", "\\udcff"),
        ("\u202e", "\\u202e"),
    ],
)
def test_what_could_drive_a_terminal_is_escaped(raw, shown):
    assert printable_ascii(raw) == shown


def test_counted():
    assert counted(1, "site") == "1 site"
    assert counted(0, "site") == "0 sites"
    assert counted(1138, "module") == "1,138 modules"
