"""What is said to explain a rule: each question with all answers that are known."""

from typing import TYPE_CHECKING, Final

from trapline.report.blocks import Gap, Paragraph, Term
from trapline.report.pages.rule_words import answer as words_of
from trapline.report.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.report.blocks import Block
    from trapline.results.rules import RuleQuestion, RuleRow, RulesExplained

_INDENT: Final = 2
_WORD: Final = 11


def page(explained: "RulesExplained", verbosity: int = 0) -> "Iterator[Block]":
    """Yield each question with its answers, the followed one first."""
    del verbosity
    disputed = sum(question.is_disputed for question in explained.questions)
    summary = f"{explained.subject}, TDX module {explained.module_version}: "
    summary += counted(len(explained.questions), "rule")
    if disputed:
        summary += f", {disputed} disputed"
    yield Paragraph(summary)
    for question in explained.questions:
        yield Gap()
        yield from _question(question)


def _question(question: "RuleQuestion") -> "Iterator[Block]":
    yield Paragraph(f"{question.table}: {question.title}")
    for answer in question.answers:
        row = answer.row
        word = _standing(row) or ("agrees" if answer.agrees else "DIFFERS")
        text = f"{words_of(question.table, row)}  [{row.claimant}]"
        yield Term(word, text, indent=_INDENT, width=_WORD)
        yield Paragraph(row.source, indent=_INDENT + _WORD)
        if row.note:
            yield Paragraph(row.note, indent=_INDENT + _WORD)
    for row in question.linux:
        yield Term("Linux", words_of("linux", row), indent=_INDENT, width=_WORD)
        yield Paragraph(row.source, indent=_INDENT + _WORD)
        if row.note:
            yield Paragraph(row.note, indent=_INDENT + _WORD)


def _standing(row: "RuleRow") -> str:
    if row.enforced:
        return "enforced"
    return "described" if row.followed else ""
