"""What in a scan goes against the policy, and so makes `trapline scan` exit with 1.

Two things do:

- a site in a form that Linux's #VE handler refuses to emulate: reaching it in a TD is an oops;
- a driver that is built in, binds to a bus whose devices the host presents, is neither let in by
  the allow list nor serves one that is, and touches the host or maps its memory: it probes before
  any filter in user space can act. The same drivers are the findings of `trapline filter check`.

Sites outside drivers are counted and listed but are no finding: a driver filter cannot act on
them. Neither are modules outside the list: they are not there until something loads them.
"""

from typing import TYPE_CHECKING, NamedTuple

from trapline.devicefilter.check import HOST_BUSES
from trapline.report.tally import reached

if TYPE_CHECKING:
    from trapline.results.scan import Driver, ScanResult, Site


class Findings(NamedTuple):
    """The findings of one scan, each in the order of the document."""

    refused: "tuple[Site, ...]"
    not_allowed: "tuple[Driver, ...]"

    def __bool__(self) -> bool:
        """Whether there is any finding."""
        return bool(self.refused or self.not_allowed)


def is_refused(site: "Site") -> bool:
    """Whether the guest's #VE handler cannot emulate what this site does."""
    return not site.emulable


def findings(result: "ScanResult") -> Findings:
    """Collect what goes against the policy."""
    outside = outsiders(result)
    return Findings(
        refused=tuple(site for site in result.sites if is_refused(site)),
        not_allowed=tuple(driver for driver in outside if driver.bus in HOST_BUSES),
    )


def outsiders(result: "ScanResult") -> "tuple[Driver, ...]":
    """Give all built-in drivers that touch the host and have nothing to do with the list.

    Those without a bus are libraries for other drivers, or probe where hardware used to be.
    """
    serving = set(reached(result))
    mapping = {found.driver for found in result.mappings}
    return tuple(
        driver
        for driver in result.drivers
        if driver.builtin
        and not driver.allowed
        and driver.name not in serving
        and (driver.sites > 0 or driver.name in mapping)
    )
