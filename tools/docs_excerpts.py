#!/usr/bin/env python3
"""Fill the excerpts in README.md and docs/ from a real report.

    trapline scan deb:linux-image-6.12-cloud-amd64 -vv -o report.txt
    tools/docs_excerpts.py report.txt

An excerpt is a code block behind a comment `<!-- excerpt: NAME... -->`; NAME is one of PARTS.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- excerpt: ([a-z ]+) -->\n```text\n).*?(```\n)", re.DOTALL)
ROWS = 8  # of a long table
CUT = "[...]"


def section(report: str, start: str) -> list[str]:
    """Return the lines from the one that starts with `start` to the next question."""
    lines = report[report.index(f"\n{start}") + 1 :].splitlines()
    text_begins = next(i for i, line in enumerate(lines) if not line.startswith("> "))
    ends = (i for i, line in enumerate(lines) if i > text_begins and line.startswith("> "))
    return lines[: next(ends, len(lines))]


def shortened(lines: list[str]) -> list[str]:
    """Keep the first rows of the table in a section, and nothing behind it."""
    rule = next(i for i, line in enumerate(lines) if re.fullmatch(r"-+(  -+)+", line))
    rows = lines[rule + 1 : lines.index("", rule)]
    # A row that goes on on the next line starts with blanks there.
    starts = [i for i, row in enumerate(rows) if not row.startswith(" ")]
    kept = rows[: starts[ROWS]] if len(starts) > ROWS else rows
    return [*lines[: rule + 1], *kept, *([CUT] if len(kept) < len(rows) else [])]


def sites(report: str) -> list[str]:
    """Return two sites with their evidence: an inlined access and a call."""
    kept: list[str] = []
    for start in (r"arch/x86/kernel/hpet\.c:\d+: MMIO", r"drivers/virtio/\S+: MMIO"):
        pattern = rf"^{start}.*\n(?: .*\n)*?    inlined .*\n(?: .*\n)*"
        found = re.search(pattern, report, re.MULTILINE)
        assert found is not None, start
        kept += found[0].splitlines()
    return kept


PARTS = {
    "head": lambda report: report.split("\n> ", 1)[0].splitlines(),
    "drivers": lambda report: section(report, "> How many places"),
    "core": lambda report: shortened(section(report, "> Sean seemed")),
    "refused": lambda report: shortened(section(report, "> It's with")),
    "vv": sites,
}


def fill(page: str, report: str) -> str:
    """Replace the contents of all excerpts of a page."""

    def block(match: re.Match[str]) -> str:
        parts = ["\n".join(PARTS[name](report)).strip("\n") for name in match[2].split()]
        return match[1] + "\n\n".join(parts) + "\n" + match[3]

    return BLOCK.sub(block, page)


def main() -> None:
    """Rewrite the pages that have excerpts."""
    report = Path(sys.argv[1]).read_text("ascii")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        page = path.read_text("utf-8")
        filled = fill(page, report)
        if filled != page:
            path.write_text(filled, "utf-8")
            print(path.relative_to(ROOT))  # noqa: T201 - what a program says


if __name__ == "__main__":
    main()
