"""What is said of a file of labels."""

from typing import TYPE_CHECKING

from trapline.report.blocks import Gap, Heading, Paragraph
from trapline.report.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.report.blocks import Block
    from trapline.results.labels import LabelList, ListedLabel


def page(result: "LabelList", verbosity: int = 0) -> "Iterator[Block]":
    """Yield the report's blocks: what needs a person first."""
    del verbosity
    held = "" if result.document is None else f", held against {result.document}"
    yield Paragraph(f"{counted(len(result.labels), 'label')} in {result.file}{held}")
    idle = [each for each in result.labels if each.fits == 0]
    carried = [each for each in result.labels if each.carried is not None and each.fits != 0]
    settled = [each for each in result.labels if each not in idle and each not in carried]
    yield from _group("Fit nothing any more", idle)
    yield from _group("Carried from another kernel, to be confirmed", carried)
    yield from _group("Said", settled)
    if result.unlabelled is not None:
        yield Gap()
        yield Paragraph(
            f"Without a label that settles them: {counted(result.unlabelled, 'finding')}."
        )


def _group(title: str, labels: "list[ListedLabel]") -> "Iterator[Block]":
    if not labels:
        return
    yield Gap()
    yield Heading(title, 1)
    yield Gap()
    for each in labels:
        fits = "" if each.fits is None else f", fits {each.fits:,}"
        yield Paragraph(f"{each.entry}. {each.label}: {each.of}{fits}", hanging=4)
        yield Paragraph(f"{each.reason} ({each.owner}, {each.date})", indent=4)
        if each.carried is not None:
            yield Paragraph(f"carried {each.carried}", indent=4)
