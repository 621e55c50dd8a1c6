"""What in a document goes against the policy: decided here, once, for all that ask.

The exit code, the level of a SARIF result, "not ok" in KTAP and the last sentence of a text all
ask `findings`; nothing else decides. A finding is:

- scan: a site in a form that Linux's #VE handler refuses to emulate, since reaching it in a TD is
  an oops; and a driver that is built in, binds to a bus whose devices the host presents, is
  neither let in by the allow list nor serves one that is, and touches the host or maps its
  memory: it probes before any filter in user space can act. Sites outside drivers are none, as a
  driver filter cannot act on them; nor are modules outside the list, as they are not there until
  something loads them;
- filter check: the same drivers;
- filter live: a check whose standing is "finding"; a "note" is a note;
- boot: a place whose accesses a policy or the allow list forbids; #VEs in a context in which none
  may come, such as on the user's stack. How a guest died, and that its kernel complained, is no
  finding but has exit codes of its own;
- explore: a run that went wrong and was not expected to. Held against a baseline, only what
  became worse is an error, the rest a note;
- verify: a cause for which the #VE handler and the processor do not agree. Held against a
  baseline, only what is new or has grown is an error, the rest a note;
- contexts: a site in a gap that may trap; what may be reached from where no trap may land: a site,
  a gate that no reason closes and that has sites behind it, an indirect branch that may lead
  anywhere. An edge that hides no part of the gap is a note;
- tradeoff: a part of the workload that failed under a design;
- diff: what is new, or has another verdict, and is not settled by a label; what is gone, moved or
  the compiler's doing is none;
- gate: what fails a check;
- labels: one that fits nothing of the document it is held against, or was carried from another
  kernel and not confirmed;
- rules diff: a row that differs; rules lint: a problem.

What a person said is all right (a label "excluded", "wrapper", "trusted" or "safe" that was not
only carried from another kernel) is a note.
"""

from collections import Counter
from functools import singledispatch
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from trapline.base.errors import ExitCode
from trapline.results.boot import FORBIDDEN_CONTEXTS, BootResult
from trapline.results.contexts import UNREAD_EDGES, ContextsResult
from trapline.results.diff import DiffResult
from trapline.results.document import Document
from trapline.results.explore import CLEAN, ExploreResult
from trapline.results.filter import FilterResult
from trapline.results.filter_live import LiveResult
from trapline.results.gate import GateResult
from trapline.results.labels import Labelled, LabelList
from trapline.results.reach import Reach
from trapline.results.rules import RulesCompared, RulesExplained, RulesLinted, RulesShown
from trapline.results.scan import ScanResult
from trapline.results.tradeoff import TradeoffResult
from trapline.results.verify import VerifyResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trapline.results.explore import Result, Window
    from trapline.results.filter import FilterDriver
    from trapline.results.scan import Driver, Site

#: "error" makes a command exit with 1; a "note" is worth knowing, and does not.
Level = Literal["error", "note"]

#: Buses whose devices the host presents, or whose descriptions (ACPI tables) it writes.
HOST_BUSES: Final = frozenset({"pci", "virtio", "vmbus", "xen", "usb", "acpi", "pnp", "platform"})


class Finding(NamedTuple):
    """One thing that goes against the policy.

    `kind` says which of the things above; `id` has no address in it, so that the same finding
    has the same id in the next build; `text` is a sentence; `subject` the part of the document;
    `label` is what a person said of it.
    """

    level: Level
    kind: str
    id: str
    text: str
    subject: Document
    label: Labelled | None = None

    @property
    def settled(self) -> bool:
        """Whether a person said that it is all right."""
        return self.label is not None and self.label.settles


def findings(document: object) -> tuple[Finding, ...]:
    """Collect what goes against the policy, in the order of the document.

    What a person said is all right is a note; what has a label tells it. Raises TypeError for what
    is no result document.
    """
    # A list of labels has entries of a file there instead.
    said = {
        label.id: label for label in getattr(document, "labels", ()) if isinstance(label, Labelled)
    }
    return tuple(
        found._replace(
            label=label, level="note" if label is not None and label.settles else found.level
        )
        for found in _found(document)
        for label in (said.get(found.id),)
    )


@singledispatch
def _found(document: object) -> tuple[Finding, ...]:
    raise TypeError(f"{type(document).__name__} is no result document")


def exit_code(document: Document) -> int:
    """Tell what a command that has this result exits with.

    That is an `ExitCode`, or what the program exited with that a guest was booted for.
    """
    if isinstance(document, BootResult) and document.outcome.exit_code:
        return ExitCode(document.outcome.exit_code)
    if isinstance(document, BootResult) and any(one.fails for one in document.complaints):
        return ExitCode.GUEST_COMPLAINED
    if any(found.level == "error" for found in findings(document)):
        return ExitCode.FINDINGS
    # What was not seen cannot be called clean.
    if not _is_complete(document):
        return ExitCode.INCOMPLETE
    if isinstance(document, DiffResult) and not (document.old.complete and document.new.complete):
        return ExitCode.INCOMPLETE
    if isinstance(document, BootResult) and document.program is not None:
        code = document.program.exit_code
        return ExitCode.INCOMPLETE if code is None else code
    return ExitCode.CLEAN


def _is_complete(document: Document) -> bool:
    """Whether all was seen that was to be looked at."""
    if isinstance(document, ScanResult | FilterResult):
        return document.coverage.complete
    if isinstance(document, ContextsResult):
        edges = (edge.kind for gap in document.gaps for edge in gap.edges)
        return not document.missing and UNREAD_EDGES.isdisjoint(edges)
    return True


def levels(found: "Iterable[Finding]") -> dict[int, Level]:
    """Map the identity, `id()`, of each finding's subject to its level, for a look-up by part."""
    return {id(each.subject): each.level for each in found}


def _unlike(name: str, seen: Counter[str]) -> str:
    """Tell findings of one name apart by their order in the document."""
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}/{seen[name]}"


# Scan and filter.


def outsiders(result: ScanResult) -> "tuple[Driver, ...]":
    """Give all built-in drivers that touch the host and have nothing to do with the list.

    Those without a bus are libraries for other drivers, or probe where hardware used to be.
    """
    serving = set(result.reached())
    mapping = {found.driver for found in result.mappings}
    return tuple(
        driver
        for driver in result.drivers
        if _is_outsider(
            builtin=driver.builtin,
            let_in=driver.allowed,
            serves=driver.name in serving,
            touches=driver.sites > 0 or driver.name in mapping,
        )
    )


def early_outsiders(drivers: "Iterable[FilterDriver]") -> "tuple[FilterDriver, ...]":
    """Give the drivers that probe, outside the list, before a filter in user space can act."""
    drivers = tuple(drivers)
    serving = {name for d in drivers if d.verdict == "allowed" for name in d.reaches}
    return tuple(
        driver
        for driver in drivers
        if driver.bus in HOST_BUSES
        and _is_outsider(
            builtin=driver.builtin,
            let_in=driver.verdict == "allowed",
            serves=driver.name in serving,
            touches=driver.reach.total > 0,
        )
    )


def _is_outsider(*, builtin: bool, let_in: bool, serves: bool, touches: bool) -> bool:
    return builtin and not let_in and not serves and touches


@_found.register
def _scan(document: ScanResult) -> tuple[Finding, ...]:
    refused = (site for site in document.sites if not site.emulable)
    foreign = (driver for driver in outsiders(document) if driver.bus in HOST_BUSES)
    return (*map(_refused_site, refused), *map(_foreign, foreign))


def _refused_site(site: "Site") -> Finding:
    text = f"{site.function}() in {site.module}: {site.instruction}: {site.reason}."
    return Finding("error", "refused-site", site.id, text, site)


@_found.register
def _filter(document: FilterResult) -> tuple[Finding, ...]:
    return tuple(map(_foreign, early_outsiders(document.drivers)))


def _foreign(driver: "Driver | FilterDriver") -> Finding:
    text = f"The built-in {driver.bus} driver {driver.name} is not on the list."
    return Finding("error", "driver-not-allowed", driver_id(driver), text, driver)


def driver_id(driver: "Driver | FilterDriver") -> str:
    """Name a driver as a finding, for those that find it in a document."""
    return f"driver:{driver.bus}:{driver.name}"


@_found.register
def _live(document: LiveResult) -> tuple[Finding, ...]:
    return tuple(
        Finding(
            "error" if check.standing == "finding" else "note",
            "live-check",
            f"live:{check.name}",
            f"{check.name}: {check.found}: {check.why}.",
            check,
        )
        for check in document.checks
        if check.standing != "ok"
    )


# What runs.


@_found.register
def _boot(document: BootResult) -> tuple[Finding, ...]:
    seen: Counter[str] = Counter()
    found = [
        Finding(
            "error",
            "forbidden-context",
            f"context:{trap}:{context}",
            f"{count:,} #VEs for {trap} in a context in which none may come: {context}.",
            document,
        )
        for trap, counts in document.contexts.items()
        for context, count in counts.items()
        if context in FORBIDDEN_CONTEXTS
    ]
    for scream in document.screams:
        # Without a site of the scan, the function: an offset would not outlive a rebuild.
        where = scream.scan_id or scream.label.partition("+")[0]
        name = _unlike(f"{scream.reason}:{scream.trap}:{where}", seen)
        text = f"{scream.label} accessed {scream.address} ({scream.trap}, {scream.reason})."
        found.append(Finding("error", "scream", name, text, scream))
    return tuple(found)


@_found.register
def _verify(document: VerifyResult) -> tuple[Finding, ...]:
    worse = {each.id for each in document.worse_than_baseline or ()}
    return tuple(
        Finding(
            "error" if document.worse_than_baseline is None or found.id in worse else "note",
            found.kind,
            found.id,
            f"{found.trap}: {found.cause}.",
            found,
        )
        for found in document.findings
    )


@_found.register
def _tradeoff(document: TradeoffResult) -> tuple[Finding, ...]:
    return tuple(
        Finding(
            "error",
            "workload",
            f"{design.name}:{step.name}",
            f"{step.name} failed under the design {design.name}.",
            step,
        )
        for design in document.designs
        for step in design.steps
        if not step.passed
    )


@_found.register
def _contexts(document: ContextsResult) -> tuple[Finding, ...]:
    sites = (
        Finding(
            "error",
            "gap-site",
            site.id,
            f"{site.place.function}() in the {gap.title} gap: {site.instruction}: {site.reason}.",
            site,
        )
        for gap in document.gaps
        for site in gap.sites
        if site.answer != "no"
    )
    edges = (
        Finding(
            "note",
            "gap-edge",
            edge.id,
            f"{edge.place.function}() in the {gap.title} gap: {edge.kind}: {edge.reason}.",
            edge,
        )
        for gap in document.gaps
        for edge in gap.edges
    )
    reached = (found for each in document.reach if each.forbidden for found in _reached(each))
    return (*sites, *edges, *reached)


def _reached(reach: Reach) -> "Iterator[Finding]":
    """Yield what may be reached from where no trap may land, with no closed gate between."""
    for site in reach.sites:
        text = f"{site.function}() is reached from the {reach.title}: {site.instruction} may trap."
        yield Finding("error", "reached-site", f"{reach.id}/{site.id}", text, site)
    for gate in reach.open_gates:
        text = (
            f"{gate.function}() is reached from the {reach.title}, and {gate.sites} sites may be"
            " from there; nobody has said why none is."
        )
        yield Finding("error", "open-gate", gate.id, text, gate)
    for each in reach.open_untold:
        text = (
            f"{each.function}() is reached from the {reach.title}: where its indirect branch leads"
            f" cannot be told, {each.targets} functions fit."
        )
        yield Finding("error", "untold-branch", each.id, text, each)


# Explore.


@_found.register
def _explore(document: ExploreResult) -> tuple[Finding, ...]:
    # A line names scenario, events and boundary, then the verdicts.
    worse = {line.partition(": ")[0]: line for line in document.worse_than_baseline or ()}
    windows = {window.scenario: window for window in document.windows}
    names: dict[str, list[str]] = {}
    seen: Counter[str] = Counter()
    found, explained = [], set()
    for run in document.results:
        if run.verdict in CLEAN or run.expected:
            continue
        label = _label(run, windows[run.scenario])
        if run.scenario not in names:
            names[run.scenario] = list(_names(windows[run.scenario]))
        is_known = document.worse_than_baseline is not None and label not in worse
        place = names[run.scenario][run.boundary]
        # Where the second event came is a number of instructions, which a rebuild changes.
        name = _unlike(f"{run.scenario}/{_events(run, '+')}/{place}", seen)
        found.append(Finding("note" if is_known else "error", run.verdict, name, run.detail, run))
        explained.add(label)
    # What is left are windows that do not open any more.
    lost = (
        Finding("error", "lost", f"{label}/lost", line, document)
        for label, line in worse.items()
        if label not in explained
    )
    return (*lost, *found)


def _label(run: "Result", window: "Window") -> str:
    boundary = window.boundaries[run.boundary]
    where = f"{boundary.function}+{boundary.offset:#x} ({boundary.instruction})"
    return f"{run.scenario} {_events(run, ',')} {where}"


def _events(run: "Result", join: str) -> str:
    return run.event if run.nested is None else f"{run.event}{join}{run.nested}"


def _names(window: "Window") -> "Iterator[str]":
    """Name each boundary by function, instruction and ordinal among its likes: no offset."""
    seen: Counter[tuple[str, str]] = Counter()
    for boundary in window.boundaries:
        key = boundary.function, boundary.instruction
        yield f"{boundary.function}:{boundary.instruction}#{seen[key]}"
        seen[key] += 1


@_found.register
def _diff(document: DiffResult) -> tuple[Finding, ...]:
    return tuple(
        Finding(
            "error",
            change.change,
            change.id,
            f"{change.where}: {change.what}{f': {change.why}' if change.why else ''}.",
            change,
        )
        for change in document.changes
        if change.error
    )


@_found.register
def _gate(document: GateResult) -> tuple[Finding, ...]:
    return tuple(
        Finding("error", check.name, item.id or f"gate:{check.name}", item.text, item)
        for check in document.checks
        for item in check.items
    )


# Labels.


@_found.register
def _labels(document: LabelList) -> tuple[Finding, ...]:
    found = []
    for each in document.labels:
        if each.fits == 0:
            text = f"Label {each.entry} fits nothing any more: {each.of}."
            found.append(Finding("error", "idle-label", f"label:{each.entry}", text, each))
        elif each.carried is not None:
            text = f"Label {each.entry} was carried and not confirmed: {each.of}."
            found.append(Finding("error", "carried-label", f"label:{each.entry}", text, each))
    return tuple(found)


# Rules.


@_found.register
def _rules(document: RulesShown | RulesExplained) -> tuple[Finding, ...]:
    del document  # what is written down is no finding
    return ()


@_found.register
def _rules_compared(document: RulesCompared) -> tuple[Finding, ...]:
    return tuple(
        Finding("error", change.change, f"{change.table}:{change.id}", "The row differs.", change)
        for change in document.changes
    )


@_found.register
def _rules_linted(document: RulesLinted) -> tuple[Finding, ...]:
    return tuple(
        Finding("error", "rule-problem", f"{one.table}:{one.text}", one.text, one)
        for one in document.problems
    )
