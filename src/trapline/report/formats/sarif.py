"""A scan as SARIF 2.1.0 (OASIS Standard, with errata 01), for code-scanning front ends.

Every site is a result of the rule of its trap class. The level is "error" for what goes against
the policy and "note" for the rest. `physicalLocation` is the source line from DWARF relative to
the top of the kernel tree (`SRCROOT`), the inline chain is in `relatedLocations`, the function
in `logicalLocations`. Finding ids are in `partialFingerprints`: they have no address in them, so
a front end follows a finding from one build to the next. What people said is all right has a
suppression with their reason.
"""

from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import msgspec

from trapline.base import encode
from trapline.report.classes import CLASSES, ClassText
from trapline.report.words import counted
from trapline.results.findings import driver_id, findings
from trapline.results.labels import SETTLED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trapline.results.findings import Level
    from trapline.results.labels import Labelled
    from trapline.results.scan import Driver, ScanResult, Site
    from trapline.results.scan import Mapping as MappingSite

_SCHEMA: Final = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_ROOT: Final = "SRCROOT"
FINGERPRINT: Final = "trapline/v2"
_MAPPING_RULE: Final = "mapping"
_DRIVER_RULE: Final = "driver-not-allowed"

_OTHER_RULES: "Final[Mapping[str, ClassText]]" = {
    _MAPPING_RULE: ClassText(
        "mapping",
        "Call that maps device memory.",
        "Where ioremap(), memremap() and their kin are called: the place at which a driver filter "
        "can act. The mapping itself does not trap.",
    ),
    _DRIVER_RULE: ClassText(
        "driver",
        "Built-in driver outside the allow list that touches the host.",
        "It probes what the host presents before any filter in user space can act. Add its device "
        "to the list, or build the kernel without it.",
    ),
}

Json = dict[str, Any]


def render(result: "ScanResult") -> "Iterator[bytes]":
    """Yield one SARIF log with one run, UTF-8."""
    yield msgspec.json.format(encode.json(log(result)), indent=1)
    yield b"\n"


def log(result: "ScanResult") -> Json:
    """Build the log as plain objects."""
    level = {finding.id: finding.level for finding in findings(result)}
    drivers = {driver_id(driver): driver for driver in result.drivers}
    rules = _rules()
    index = {rule["id"]: position for position, rule in enumerate(rules)}
    results = [
        *(_site(site, level.get(site.id, "note")) for site in result.sites),
        *(_mapping(mapping) for mapping in result.mappings),
        *(_driver(driver, level[name]) for name, driver in drivers.items() if name in level),
    ]
    said = {label.id: label for label in result.labels}
    for each in results:
        each["ruleIndex"] = index[each["ruleId"]]
        label = said.get(each["partialFingerprints"][FINGERPRINT])
        if label is not None:
            _add_label(each, label)
    properties = {"kernel": msgspec.to_builtins(result.kernel), "counts": result.counts}
    missing = (*result.coverage.missing, *result.coverage.advice)
    place = f"trapline/scan/{result.kernel.release or 'unknown'}/"
    return run_of(result.generator, rules, results, missing, {"id": place}, properties)


def run_of(
    generator: str,
    rules: list[Json],
    results: list[Json],
    missing: "Iterable[str]",
    automation: Json,
    properties: Json,
) -> Json:
    """Make a log with one run; `missing` says in the log's own terms what could not be seen."""
    name, _, version = generator.partition(" ")
    driver: Json = {"name": name, "rules": rules}
    if version:
        driver["version"] = version
    notes = [{"level": "warning", "message": {"text": text}} for text in missing]
    run: Json = {
        "tool": {"driver": driver},
        "automationDetails": automation,
        "columnKind": "utf16CodeUnits",
        "invocations": [{"executionSuccessful": True, "toolExecutionNotifications": notes}],
        "results": results,
        "properties": properties,
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _add_label(found: Json, label: "Labelled") -> None:
    """Say what a person said; where that it is all right, as a suppression (SARIF 2.1.0, 3.35)."""
    found["properties"] = {**found.get("properties", {}), "label": label.label}
    if label.label in SETTLED:
        text = f"{label.label}: {label.reason} ({label.owner}, {label.date})"
        status = "accepted" if label.settles else "underReview"
        found["suppressions"] = [{"kind": "external", "status": status, "justification": text}]


def _rules() -> list[Json]:
    texts: dict[str, ClassText] = {**CLASSES, **_OTHER_RULES}
    return [
        rule_of(rule, text, "error" if rule == _DRIVER_RULE else "note")
        for rule, text in texts.items()
    ]


def rule_of(rule: str, text: ClassText, level: "Level") -> Json:
    """Describe a rule of the log."""
    return {
        "id": rule,
        "shortDescription": {"text": text.summary},
        "fullDescription": {"text": text.details},
        "help": {"text": f"{text.summary} {text.details}"},
        "defaultConfiguration": {"level": level},
    }


def _site(site: "Site", level: "Level") -> Json:
    title = CLASSES[site.trap].title
    what = f"{title} {site.access}" if site.access != "execute" else title
    where = f"{site.function}() in {site.module}"
    hidden = {"instruction": "", "paravirt": " behind a paravirt call", "call": " by a call"}
    handler = "emulates it" if site.emulable else "refuses it"
    return {
        "ruleId": site.trap,
        "level": level,
        "message": {
            "text": f"{what}{hidden[site.form]} in {where}: {site.instruction}. "
            f"The #VE handler {handler}: {site.reason}."
        },
        **_place(site),
        "properties": {
            "form": site.form,
            "access": site.access,
            "width": site.width,
            "address": site.address,
            "bytes": site.bytes,
            "section": site.section,
            "emulable": site.emulable,
            "driver": site.driver,
            "subsystem": site.subsystem,
        },
    }


def _mapping(mapping: "MappingSite") -> Json:
    return {
        "ruleId": _MAPPING_RULE,
        "level": "note",
        "message": {"text": f"{mapping.function}() in {mapping.module} calls {mapping.mapper}()."},
        **_place(mapping),
        "properties": {
            "address": mapping.address,
            "section": mapping.section,
            "driver": mapping.driver,
            "subsystem": mapping.subsystem,
        },
    }


def _driver(driver: "Driver", level: "Level") -> Json:
    return {
        "ruleId": _DRIVER_RULE,
        "level": level,
        "message": {
            "text": f"The built-in {driver.bus} driver {driver.name} is not on the allow list and "
            f"touches the host at {counted(driver.sites, 'place')}."
        },
        "locations": [{"logicalLocations": [{"name": driver.name, "kind": "module"}]}],
        "partialFingerprints": {FINGERPRINT: driver_id(driver)},
    }


def _place(found: "Site | MappingSite") -> Json:
    """Say where a finding is: its line, its function, and the functions inlined there."""
    function: Json = {
        "name": found.function,
        "fullyQualifiedName": f"{found.module}!{found.function}",
        "kind": "function",
    }
    location: Json = {"logicalLocations": [function]}
    if found.file:
        location["physicalLocation"] = physical(found.file, found.line)
    related = [
        {
            "id": number,
            "message": {"text": f"inlined {frame.function}()"},
            "physicalLocation": physical(frame.file, frame.line),
        }
        for number, frame in enumerate(found.inlined)
        if frame.file
    ]
    place: Json = {
        "locations": [location],
        "partialFingerprints": {FINGERPRINT: found.id},
    }
    if related:
        place["relatedLocations"] = related
    return place


def physical(file: str, line: int | None) -> Json:
    """Say where a line of source is, below the top of the kernel tree."""
    absolute = file.startswith("/")
    artifact: Json = {"uri": ("file://" if absolute else "") + quote(file)}
    if not absolute:
        artifact["uriBaseId"] = _ROOT
    physical: Json = {"artifactLocation": artifact}
    if line:  # DWARF's line 0 is "no line"
        physical["region"] = {"startLine": line}
    return physical
