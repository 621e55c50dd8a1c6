"""Every page can be written in a format that has nothing of text: here one with tags."""

import html
import re
from html.parser import HTMLParser
from typing import get_args

import pytest

from golden_documents import GOLDEN
from reports import text
from trapline.allowlist.entries import AllowList
from trapline.report import blocks
from trapline.report.records import ALLOW_LIST, record_of


def page(document, verbosity):
    record = ALLOW_LIST if isinstance(document, AllowList) else record_of(document)
    return list(record.page(document, verbosity))


def tag(name, *inside):
    return f"<{name}>{''.join(inside)}</{name}>"


def escaped(name, *texts):
    return tag(name, *(html.escape(str(each)) for each in texts))


def cells(name, row):
    return tag("tr", *(escaped(name, cell) for cell in row))


def strip(block):
    places = zip(block.marks, block.names, strict=True)
    return tag(
        "ol", *(tag("li", escaped("b", name), block.words.get(mark, "")) for mark, name in places)
    )


def matrix(block):
    bodies = (
        tag("tbody", cells("th", [title]), *(cells("td", [name, *counts]) for name, counts in rows))
        for title, rows in block.groups.items()
    )
    return tag("table", tag("thead", cells("th", block.columns)), *bodies)


TAGS = {
    blocks.Gap: lambda _: "",
    blocks.Heading: lambda block: escaped(f"h{block.level}", block.text),
    blocks.Paragraph: lambda block: escaped("p", block.text),
    blocks.Quote: lambda block: escaped("blockquote", block.text),
    blocks.Item: lambda block: escaped("li", block.text),
    blocks.Term: lambda block: escaped("dt", block.name) + escaped("dd", block.text),
    blocks.Table: lambda block: tag(
        "table", cells("th", block.header), *(cells("td", row) for row in block.rows)
    ),
    blocks.Matrix: matrix,
    blocks.Code: lambda block: escaped("pre", "\n".join(block.lines)),
    blocks.Strip: strip,
    blocks.Details: lambda block: tag(
        "details", escaped("summary", block.summary), *map(marked, block.blocks)
    ),
}


def marked(block):
    return TAGS[type(block)](block)


class Words(HTMLParser):
    """Collects the words, and checks that what is opened is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.words, self.tags = [], [], set()

    def handle_starttag(self, name, attrs):
        assert attrs == []
        self.open.append(name)
        self.tags.add(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open[-1] != "summary":
            self.words += re.findall(r"[a-z_]{4,}", data)


def read(document, verbosity):
    parser = Words()
    parser.feed("".join(map(marked, page(document, verbosity))))
    assert parser.open == []
    return parser


CASES = [(name, level) for name, (_, levels) in GOLDEN.items() for level in levels]


@pytest.mark.parametrize(("name", "verbosity"), CASES)
def test_a_page_with_tags_says_what_its_text_says(name, verbosity):
    document = GOLDEN[name][0]()
    said = " ".join(read(document, verbosity).words)
    # Words that are longer may be broken where a line ends.
    words = re.findall(r"(?<![\w\\])[a-z_]{4,20}(?!\w)", text(document, verbosity))
    missing = {word for word in words if word not in said}
    assert not missing


def test_every_kind_of_block_is_on_some_page_and_has_its_tag():
    seen = set()

    def look(found):
        for block in found:
            seen.add(type(block))
            if isinstance(block, blocks.Details):
                look(block.blocks)

    for name, level in CASES:
        look(page(GOLDEN[name][0](), level))
    assert seen == set(TAGS) == set(get_args(blocks.Block))


def test_blocks_hold_text_as_the_document_has_it():
    document = GOLDEN["boot-panic"][0]()
    (place,) = [place for place in document.splat.trace if "evil" in place.label]
    codes = [block for block in page(document, 0) if isinstance(block, blocks.Code)]
    assert any(f" {place.label}" in block.lines for block in codes)
