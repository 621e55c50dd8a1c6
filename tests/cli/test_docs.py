"""The documentation cannot go stale: commands, options and exit codes are held against it."""

import re
import runpy
from pathlib import Path

import click
import pytest

import scan_documents
from reports import text
from trapline.base.errors import ExitCode, TraplineError
from trapline.cli.main import COMMANDS, cli

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("**/*.md")))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def walk(command, context, path=()):
    yield path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from walk(command.get_command(context, name), context, (*path, name))


def commands():
    return [(path, c) for path, c in walk(cli, click.Context(cli, **cli.context_settings)) if path]


@pytest.fixture(scope="module")
def reference():
    return runpy.run_path(str(ROOT / "tools" / "docs_pages.py"))["cli_reference"]()


@pytest.mark.parametrize(("path", "command"), commands())
def test_every_command_and_option_has_help_and_is_in_the_reference(path, command, reference):
    assert command.help
    assert f" {' '.join(('trapline', *path))}\n" in reference
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{path}: {option.name} has no help"
            for name in option.opts:
                assert name in reference


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_explained_on_a_page(name):
    pages = [page.read_text("utf-8") for page in DOCS.glob("*.md")]
    assert any(f"trapline {name}" in page for page in pages)


def test_every_option_of_scan_is_explained_on_its_page():
    page = (DOCS / "scan.md").read_text("utf-8")
    scan = cli.get_command(click.Context(cli, **cli.context_settings), "scan")
    for option in scan.params:
        if isinstance(option, click.Option):
            assert f"`{option.opts[0]}" in page, f"{option.opts[0]} is not in scan.md"


def test_every_option_of_explore_is_explained_on_its_page():
    page = (DOCS / "explore.md").read_text("utf-8")
    explore = cli.get_command(click.Context(cli, **cli.context_settings), "explore")
    for option in explore.params:
        if isinstance(option, click.Option):
            assert any(name in page for name in option.opts), f"{option.opts[0]} is not there"


def test_exit_code_table_is_the_enumeration():
    page = (DOCS / "exit-codes.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.+) \|$", page, re.MULTILINE)
    assert [(int(number), name) for number, name, _ in rows] == [
        (code.value, code.name) for code in ExitCode
    ]


def test_every_kind_of_error_has_an_exit_code_of_its_own():
    codes = [error.exit_code for error in TraplineError.__subclasses__()]
    assert len(codes) == len(set(codes))


def test_readme_gives_the_two_commands():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "make demo" in readme
    assert "make test" in readme
    assert len(readme.splitlines()) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page):
    """On the web as in a checkout: pages that only `make docs` makes are in its menu alone."""
    for link in LINK.findall(page.read_text("utf-8")):
        if "://" not in link and link.partition("#")[0]:
            assert (page.parent / link.partition("#")[0]).is_file(), link


def test_no_page_names_a_place_of_its_author():
    for page in PAGES:
        assert not re.search(r"(?<![\w/])/(work|root|home)/", page.read_text("utf-8")), page


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/scan.md"])
def test_excerpts_have_the_words_of_a_report(page):
    """Numbers differ from kernel to kernel; questions and explanations must be today's."""
    words = set(text(scan_documents.document(), 2).splitlines())
    shown = re.findall(
        r"<!-- excerpt: .*? -->\n```text\n(.*?)```\n", (ROOT / page).read_text("utf-8"), re.DOTALL
    )
    assert shown
    lines = "".join(shown).splitlines()
    assert lines
    assert {line for line in lines if line.startswith("> ")} <= words
    headers = {line for line in lines if re.match(r"(code|subsystem|class)  +", line)}
    assert {tuple(line.split()) for line in headers} <= {tuple(line.split()) for line in words}
