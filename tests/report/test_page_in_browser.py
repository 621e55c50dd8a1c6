"""The HTML page in a real browser: filters, links, keys, counts, and no word of complaint."""

import shutil

import msgspec
import pytest
from playwright.sync_api import expect, sync_playwright
from test_page import HOSTILE, page

from golden_documents import GOLDEN

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.xdist_group("browser"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # Its own sandbox wants a user namespace, which containers and root do not have.
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def show(browser, tmp_path):
    """Open a document's page; fails at the end if the browser complained or asked for anything."""
    said, contexts = [], []

    def shown(document, where="", **options):
        path = tmp_path / "page.html"
        path.write_text(page(document), encoding="utf-8")
        context = browser.new_context(**options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda asked: asked.url.startswith("file:") or said.append(asked.url))
        tab.goto(f"{path.as_uri()}{where}")
        tab.wait_for_selector("body[data-ready]")
        return tab

    yield shown
    for context in contexts:
        context.close()
    assert said == []


def many(count):
    """A scan of many sites, of a few subsystems and classes."""
    document = GOLDEN["scan"][0]()
    first = document.sites[0]
    classes = ("mmio", "pio", "msr")
    sites = tuple(
        msgspec.structs.replace(
            first,
            id=f"{number:016x}",
            trap=classes[number % 3],
            subsystem=f"subsystem {number % 7}",
            function=f"function_{number}",
        )
        for number in range(count)
    )
    return msgspec.structs.replace(document, sites=sites)


def count(tab):
    return tab.locator(".count[role=status]").inner_text()


def facet(tab, value):
    return tab.locator(f'.facets button[title="{value}"]')


@pytest.mark.parametrize(
    "name", ["scan", "boot", "boot-panic", "explore", "verify", "tradeoff", "filter-check", "rules"]
)
def test_the_page_of_each_command_opens(show, name):
    document = GOLDEN[name][0]()
    tab = show(document)
    expect(tab.locator("h1")).not_to_be_empty()
    rows = document.rows(document.lists[0])
    if rows:
        assert count(tab) == f"{len(rows)} of {len(rows)}"


def test_filters_count_what_the_document_has(show):
    tab = show(many(2100))
    assert count(tab) == "2,100 of 2,100"
    facet(tab, "mmio").click()
    assert count(tab) == "700 of 2,100"
    facet(tab, "subsystem 3").click()
    assert count(tab) == "100 of 2,100"
    assert facet(tab, "subsystem 3").locator(".count").inner_text() == "100"
    assert facet(tab, "subsystem 4").locator(".count").inner_text() == "100"  # what it would add
    tab.get_by_label("Filter").fill("function_3 mmio")
    expected = sum(
        n % 3 == 0 and n % 7 == 3 and f"function_{n}".startswith("function_3") for n in range(2100)
    )
    assert count(tab) == f"{expected} of 2,100"
    tab.get_by_role("button", name="clear").click()
    assert count(tab) == "2,100 of 2,100"


def test_a_link_says_what_is_shown(show):
    document = many(210)
    tab = show(document, "#f.class=mmio&f.subsystem=subsystem+3&row=3")
    assert count(tab) == "10 of 210"
    expect(tab.locator(".evidence h4")).to_have_text(document.sites[3].id)
    facet(tab, "pio").click()
    assert "f.class=pio" in tab.url
    again = show(document, "#" + tab.url.partition("#")[2])
    assert count(again) == count(tab) == "20 of 210"


def test_the_map_has_all_areas_and_filters(show):
    tab = show(many(210))
    expect(tab.locator(".map text")).to_have_count(7)
    tab.locator(".map rect").first.click()
    assert count(tab) == "30 of 210"
    expect(tab.locator(".map text")).to_have_count(1)


def test_keys(show):
    document = many(210)
    tab = show(document)
    tab.keyboard.press("/")
    expect(tab.get_by_label("Filter")).to_be_focused()
    tab.locator(".rows").focus()
    for _ in range(40):
        tab.keyboard.press("j")
    expect(tab.locator(".evidence h4")).to_have_text(document.sites[39].id)
    expect(tab.locator(".row.chosen")).to_be_in_viewport()
    tab.keyboard.press("Escape")
    expect(tab.locator(".evidence h4")).to_have_count(0)


def test_only_rows_in_view_are_made(show):
    tab = show(many(10_500))
    assert tab.locator(".row").count() < 80
    tab.locator(".rows").evaluate("rows => { rows.scrollTop = rows.scrollHeight; }")
    expect(tab.locator(".row").filter(has_text="function_10499")).to_be_visible()


def test_hostile_names_are_shown_and_do_nothing(show):
    document = many(30)
    site = msgspec.structs.replace(document.sites[0], function=HOSTILE, subsystem=HOSTILE)
    tab = show(msgspec.structs.replace(document, sites=(site, *document.sites[1:])), "#row=0")
    assert tab.locator("img").count() == 0
    assert "<img src=x onerror=alert(1)>" in tab.locator(".evidence").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_button(show, scheme):
    tab = show(many(30), color_scheme=scheme)

    def is_dark():
        colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        return int(colour.strip("rgb()").split(",")[0]) < 100

    assert is_dark() == (scheme == "dark")
    tab.get_by_title("light or dark").click()
    assert is_dark() == (scheme == "light")


def test_a_narrow_window_needs_no_sideways_scrolling(show):
    tab = show(many(300), viewport={"width": 400, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
