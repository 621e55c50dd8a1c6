"""The HTML page without a browser: whole, harmless, and with all that its document has."""

import base64
import json
import re
from hashlib import sha256
from html.parser import HTMLParser

import msgspec
import pytest

from golden_documents import GOLDEN
from trapline.allowlist.entries import AllowList
from trapline.base.printable import printable
from trapline.report.records import record_of

VOID = {"meta"}
NAMES = [name for name, (make, _) in GOLDEN.items() if not isinstance(make(), AllowList)]
HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[31m\u202e<!--"


def page(document):
    return b"".join(record_of(document).render(document, "html")).decode()


class Elements(HTMLParser):
    """Holds that what is opened is closed, and collects attributes and the contents of scripts."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.scripts, self.styles, self.text = [], [], [], [], []

    def handle_starttag(self, name, attrs):
        self.attributes += [(name, *each) for each in attrs]
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        here = self.open[-1] if self.open else ""
        kept = {"script": self.scripts, "style": self.styles}.get(here, self.text)
        kept.append(data)


def read(text):
    parser = Elements()
    parser.feed(text)
    assert parser.open == []
    return parser


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_whole_and_asks_for_nothing(name):
    parser = read(page(GOLDEN[name][0]()))
    for tag, attribute, value in parser.attributes:
        assert not attribute.startswith("on"), (tag, attribute)
        assert attribute not in {"src", "href", "style", "srcset", "action"}, (tag, attribute)
        assert "//" not in (value or ""), (tag, attribute, value)


@pytest.mark.parametrize("name", NAMES)
def test_what_runs_is_what_the_policy_allows(name):
    parser = read(page(GOLDEN[name][0]()))
    (policy,) = [value for tag, _, value in parser.attributes if "default-src" in (value or "")]
    data, script = parser.scripts
    (style,) = parser.styles
    for text in (style, script):
        digest = base64.b64encode(sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    json.loads(data)


def cells(part, rows):
    """Turn numbers back into what the document had."""
    return [[part["texts"][c] if isinstance(c, int) else c[0] for c in row] for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_the_rows_of_its_document(name):
    document = GOLDEN[name][0]()
    (part,) = json.loads(read(page(document)).scripts[0])
    lists = {each["name"]: each for each in part["lists"]}
    for wanted in document.lists:
        rows = document.rows(wanted)
        if not rows:
            assert wanted not in lists
            continue
        assert lists[wanted]["columns"] == list(rows[0])
        assert cells(part, lists[wanted]["rows"]) == [
            [as_shown(value) for value in row.values()] for row in rows
        ]


def as_shown(value):
    return printable(value) if isinstance(value, str) else value


def test_names_of_a_hostile_kernel_stay_names():
    document = GOLDEN["scan"][0]()
    site = msgspec.structs.replace(
        document.sites[0], function=HOSTILE, subsystem=HOSTILE, instruction=HOSTILE
    )
    text = page(
        msgspec.structs.replace(
            document,
            sites=(site, *document.sites[1:]),
            kernel=msgspec.structs.replace(document.kernel, release=HOSTILE),
        )
    )
    assert "<img" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.count("<!--") == 0
    assert text.count("</script>") == 2
    (part,) = json.loads(read(text).scripts[0])
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert shown in part["texts"]


def test_findings_are_marked_and_counted():
    document = GOLDEN["scan"][0]()
    text = page(document)
    (part,) = json.loads(read(text).scripts[0])
    sites = next(each for each in part["lists"] if each["name"] == "sites")
    marked = {at for at, _ in sites["found"]}
    assert marked == {at for at, site in enumerate(document.sites) if not site.emulable}
    assert re.search(rf"{part['findings']} findings", text)
    assert "0 findings" in page(GOLDEN["scan-clean"][0]())


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("scan-clean", "good", "0 findings"),
        ("scan", "bad", "findings"),
        ("boot-panic", "bad", "exit code 20, GUEST_PANIC"),
        ("scan-incomplete", "bad", "1 finding"),
    ],
)
def test_the_verdict_is_that_of_the_exit_code(name, kind, said):
    text = page(GOLDEN[name][0]())
    (verdict,) = re.findall(r'<p class="verdict (\w+)"><strong>(.*?)</strong>', text)
    assert verdict[0] == kind
    assert said in verdict[1]


def test_nothing_found_in_what_was_not_seen_is_not_good():
    document = GOLDEN["scan-clean"][0]()
    coverage = msgspec.structs.replace(document.coverage, complete=False)
    text = page(msgspec.structs.replace(document, coverage=coverage))
    assert '<p class="verdict bad"><strong>0 findings; exit code 31, INCOMPLETE' in text
