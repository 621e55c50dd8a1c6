"""Holds the results of a kernel against a policy, a baseline and labels."""

from typing import TYPE_CHECKING, NamedTuple

from trapline.gate.placecounts import new_places, unseen
from trapline.labels.subjects import subject_of
from trapline.results.boot import BootResult
from trapline.results.findings import findings
from trapline.results.gate import GateCheck, GateItem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from trapline.labels.applied import Labels
    from trapline.results.contexts import ContextsResult
    from trapline.results.findings import Finding
    from trapline.results.gate import GateBaseline, GatePolicy
    from trapline.results.scan import ScanResult, Site


class Judge(NamedTuple):
    """What all checks hold a kernel against."""

    policy: "GatePolicy"
    before: "GateBaseline | None"
    labels: "Labels | None"

    def scan(self, scan: "ScanResult") -> "Iterator[GateCheck]":
        """Check what a scan found."""
        fail = self.policy.fail
        found = findings(scan)
        if fail.incomplete:
            yield self._complete(scan)
        grown = None if self.before is None else new_places(scan, self.before)
        if fail.new_places and self.before is not None and grown is not None:
            yield self._new(grown, self.before.kernel)
        if fail.refused:
            # An edit above likes gives them new ids; that they are more is what counts.
            new = None if grown is None else {site.id for site in grown}
            refused = (
                one
                for one in found
                if one.kind == "refused-site" and (new is None or one.id in new)
            )
            yield self.check("refused", "the #VE handler can emulate what is new", refused)
        if fail.drivers:
            drivers = (one for one in found if one.kind == "driver-not-allowed")
            asks = "no further built-in driver off the list touches the host"
            yield self.check("drivers", asks, drivers)

    def boot(self, boot: BootResult) -> GateCheck:
        """Check a boot: its end, and what was forbidden."""
        check = self.check("boot", "the guest boots, and does nothing forbidden", findings(boot))
        if not boot.outcome.exit_code:
            return check
        died = _bare(f"{boot.outcome.kind}: {boot.outcome.detail}")
        return GateCheck(
            name=check.name,
            asks=check.asks,
            known=check.known,
            settled=check.settled,
            items=(died, *check.items),
        )

    def contexts(self, proved: "ContextsResult") -> GateCheck:
        """Check what was proved of the gaps."""
        return self.check("contexts", "no trap in a gap of the entry code", findings(proved))

    def check(self, name: str, asks: str, found: "Iterable[Finding]") -> GateCheck:
        """Make a check of findings: all that are new and not settled fail it."""
        errors = [one for one in found if one.level == "error" or one.settled]
        known = set() if self.before is None else set(self.before.findings)
        fresh = [one for one in errors if one.id not in known]
        settled = [one for one in fresh if one.settled]
        return GateCheck(
            name=name,
            asks=asks,
            known=len(errors) - len(fresh),
            settled=len(settled),
            items=tuple(
                GateItem(
                    id=one.id,
                    text=one.text,
                    driver=getattr(one.subject, "driver", None),
                    label=one.label,
                )
                for one in fresh
                if not one.settled
            ),
        )

    def _complete(self, scan: "ScanResult") -> GateCheck:
        known = set() if self.before is None else set(self.before.findings)
        missing = [text for text in scan.coverage.missing if unseen(text) not in known]
        return GateCheck(
            name="complete",
            asks="all of the kernel was seen",
            known=len(scan.coverage.missing) - len(missing),
            settled=0,
            items=tuple(map(_bare, missing)),
        )

    def _new(self, grown: "Sequence[Site]", kernel: str) -> GateCheck:
        sites = [site for site in grown if site.trap in self.policy.fail.classes]
        said = [None if self.labels is None else self.labels.of(subject_of(s)) for s in sites]
        return GateCheck(
            name="new-places",
            asks=f"no further place touches the host than in {kernel}",
            known=0,
            settled=sum(label is not None and label.settles for label in said),
            items=tuple(
                GateItem(id=site.id, text=_describe(site), driver=site.driver, label=label)
                for site, label in zip(sites, said, strict=True)
                if label is None or not label.settles
            ),
        )


def _bare(text: str) -> GateItem:
    return GateItem(id="", text=text, driver=None, label=None)


def _describe(site: "Site") -> str:
    where = f"{site.file}:{site.line or '?'}: " if site.file else ""
    accessor = f" ({site.accessor})" if site.accessor else ""
    return f"{where}{site.owner or site.function}(): {site.trap} {site.access}{accessor}"
