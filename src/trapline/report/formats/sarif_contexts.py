"""What may trap in a gap as SARIF 2.1.0: an error each, and what was not followed as a note."""

from typing import TYPE_CHECKING, Final

import msgspec

from trapline.base import encode
from trapline.report.classes import ClassText
from trapline.report.formats.sarif import FINGERPRINT, Json, physical, rule_of, run_of
from trapline.results.contexts import GapEdge, GapSite
from trapline.results.findings import findings
from trapline.results.reach import Gate, ReachedSite, Untold

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.results.contexts import ContextsResult
    from trapline.results.findings import Finding
    from trapline.results.reach import Step

_RULES: Final = {
    "gap-site": ClassText(
        "site in a gap",
        "Instruction that may trap where no trap may land.",
        "Between the hardware's entry and a state that is the kernel's (stack, GS base, page "
        "table, VE_INFO), and on the way out, a #VE is a double fault or runs on what is not the "
        "kernel's.",
    ),
    "gap-edge": ClassText(
        "edge out of a gap",
        "Path in a gap that was not followed.",
        "Where it leads is not known, or leads to code that is no part of the gap's proof.",
    ),
    "reached-site": ClassText(
        "site reached from a forbidden context",
        "Instruction that may trap and is reached from where no trap may land.",
        "The related locations are the shortest chain of calls to it.",
    ),
    "open-gate": ClassText(
        "open gate",
        "Function that is reached from where no trap may land, and leads to sites that may trap.",
        "Write down in a file of labels why no site behind it is reached, or mend the call.",
    ),
    "untold-branch": ClassText(
        "indirect branch that is not told",
        "Indirect branch, reached from where no trap may land, whose targets cannot be told.",
        "Write down in a file of labels where it leads, or that no target may trap.",
    ),
}
Subject = GapSite | GapEdge | ReachedSite | Gate | Untold


def render(result: "ContextsResult") -> "Iterator[bytes]":
    """Yield one SARIF log with one run, UTF-8."""
    yield msgspec.json.format(encode.json(log(result)), indent=1)
    yield b"\n"


def log(result: "ContextsResult") -> Json:
    """Build the log as plain objects."""
    rules = [
        rule_of(name, text, "note" if name == "gap-edge" else "error")
        for name, text in _RULES.items()
    ]
    index = {name: number for number, name in enumerate(_RULES)}
    return run_of(
        result.generator,
        rules,
        [_result(found, index[found.kind]) for found in findings(result)],
        result.missing,
        {"id": f"trapline/contexts/{result.kernel.release or 'unknown'}/"},
        {"kernel": msgspec.to_builtins(result.kernel)},
    )


def _result(found: "Finding", index: int) -> Json:
    subject = found.subject
    assert isinstance(subject, Subject), "what the findings of this document are about"
    place = subject.place if isinstance(subject, GapSite | GapEdge) else subject
    location: Json = {"logicalLocations": [{"name": place.function, "kind": "function"}]}
    if place.file:
        location["physicalLocation"] = physical(place.file, place.line)
    result: Json = {
        "ruleId": found.kind,
        "ruleIndex": index,
        "level": found.level,
        "message": {"text": found.text},
        "locations": [location],
        "partialFingerprints": {FINGERPRINT: found.id},
    }
    chain = subject.chain if isinstance(subject, ReachedSite | Gate) else ()
    related = [_step(number, step) for number, step in enumerate(chain) if step.file]
    if related:
        result["relatedLocations"] = related
    return result


def _step(number: int, step: "Step") -> Json:
    assert step.file is not None, "steps without a line are left out"
    return {
        "id": number,
        "message": {"text": f"{step.function}() goes on from here"},
        "physicalLocation": physical(step.file, step.line),
    }
