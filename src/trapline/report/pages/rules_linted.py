"""What is said of rule tables that were checked: their problems."""

from typing import TYPE_CHECKING

from trapline.report.blocks import Paragraph

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.report.blocks import Block
    from trapline.results.rules import RulesLinted


def page(linted: "RulesLinted", verbosity: int = 0) -> "Iterator[Block]":
    """Yield what the linter found, or one line that says that all is well."""
    del verbosity
    texts = [f"{one.table}.csv:{one.line}: {one.text}" for one in linted.problems]
    for text in texts or [f"{linted.subject}: no problems."]:
        yield Paragraph(text, hanging=4)
