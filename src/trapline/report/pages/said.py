"""What people said of a document's findings, in one paragraph for any page."""

from collections import Counter
from typing import TYPE_CHECKING, Final, get_args

from trapline.report.blocks import Paragraph
from trapline.report.words import counted
from trapline.results.findings import findings
from trapline.results.labels import Label

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trapline.report.blocks import Block
    from trapline.results.document import ResultDocument
    from trapline.results.labels import Labelled

_LABELS: Final = get_args(Label)


def said(result: "ResultDocument", labels: "Sequence[Labelled]") -> "Iterator[Block]":
    """Count labels, and what they settle; nothing where there are none."""
    if not labels:
        return
    counts = Counter(label.label for label in labels)
    listed = ", ".join(f"{counts[name]:,} {name}" for name in _LABELS if counts[name])
    settled = sum(found.settled for found in findings(result))
    carried = sum(label.carried is not None for label in labels)
    unconfirmed = f"; {carried:,} were carried and not confirmed" if carried else ""
    yield Paragraph(f"Labels: {listed}. They settle {counted(settled, 'finding')}{unconfirmed}.")
