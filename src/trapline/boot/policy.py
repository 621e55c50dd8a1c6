"""What the user lets a TD do on each class of access: trap, paravirtualise, or scream.

trap       as the TDX module does: #VE
paravirt   at sites that the scan knows, the host call without a #VE; what still traps is
what a conversion of those sites would have missed
forbid     the access screams, and then traps or ends the run
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from trapline.allowlist.entries import AllowList
from trapline.base.errors import UsageError
from trapline.results.trapclass import POLICY_CLASSES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trapline.machine.qemu.pci import Function

Mode = Literal["trap", "paravirt", "forbid"]
MODES: Final[tuple[Mode, ...]] = ("trap", "paravirt", "forbid")


def parse(texts: "Iterable[str]") -> dict[str, Mode]:
    """Read `--policy CLASS=MODE` arguments; raises UsageError."""
    policies: dict[str, Mode] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        mode = next((known for known in MODES if known == value), None)
        if not equals or name not in POLICY_CLASSES or mode is None:
            raise UsageError(
                f"--policy {text!r} is not CLASS=MODE with one of {', '.join(POLICY_CLASSES)} "
                f"and one of {', '.join(MODES)}."
            )
        if policies.get(name, mode) != mode:
            raise UsageError(f"--policy names {name} twice; give it once.")
        policies[name] = mode
    return policies


@dataclass(frozen=True, slots=True)
class Guard:
    """What a run is to watch over.

    `classes` are modes by class. Devices that `allow` does not let in are hidden from the guest
    (`hide`), or scream when they are used. `panic` ends the run at the first forbidden access.
    """

    classes: dict[str, Mode] = field(default_factory=dict)
    allow: AllowList | None = None
    hide: bool = True
    panic: bool = False

    @property
    def needs_scan(self) -> bool:
        """Whether sites must be known before the run."""
        return bool(self.classes) or (self.allow is not None and not self.hide)

    def is_allowed(self, function: "Function") -> bool | None:
        """Whether the list lets a device in; None without a list."""
        return None if self.allow is None else self.allow.matching(function.modalias) is not None
