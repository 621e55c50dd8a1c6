"""How a run of a TD ended."""

from dataclasses import dataclass
from enum import StrEnum

from trapline.base.errors import ExitCode


class OutcomeKind(StrEnum):
    """The reasons for which a run ends."""

    POWERED_OFF = "powered-off"
    RESET = "reset"
    HALTED = "halted"
    PANIC = "panic"
    DOUBLE_FAULT = "double-fault"
    TRIPLE_FAULT = "triple-fault"
    FATAL_ERROR = "fatal-error"
    HANG = "hang"
    CONSOLE_FLOOD = "console-flood"
    EPT_VIOLATION = "ept-violation"
    TD_DEAD = "td-dead"
    DEVICES_DIED = "devices-died"
    FORBIDDEN = "forbidden"
    TIMEOUT = "timeout"
    LEFT = "left"
    INTERRUPTED = "interrupted"

    @property
    def exit_code(self) -> ExitCode:
        """What the process exits with."""
        return _EXIT_CODES[self]


_EXIT_CODES = {
    OutcomeKind.POWERED_OFF: ExitCode.CLEAN,
    OutcomeKind.RESET: ExitCode.CLEAN,
    OutcomeKind.HALTED: ExitCode.CLEAN,
    OutcomeKind.PANIC: ExitCode.GUEST_PANIC,
    OutcomeKind.DOUBLE_FAULT: ExitCode.GUEST_DOUBLE_FAULT,
    OutcomeKind.TRIPLE_FAULT: ExitCode.GUEST_TRIPLE_FAULT,
    OutcomeKind.FATAL_ERROR: ExitCode.GUEST_FATAL_ERROR,
    OutcomeKind.HANG: ExitCode.GUEST_HANG,
    OutcomeKind.CONSOLE_FLOOD: ExitCode.GUEST_HANG,
    OutcomeKind.EPT_VIOLATION: ExitCode.GUEST_EPT_VIOLATION,
    OutcomeKind.TD_DEAD: ExitCode.GUEST_TRIPLE_FAULT,
    OutcomeKind.DEVICES_DIED: ExitCode.BAD_MACHINE,
    OutcomeKind.FORBIDDEN: ExitCode.FORBIDDEN_ACCESS,
    OutcomeKind.TIMEOUT: ExitCode.TIMEOUT,
    OutcomeKind.LEFT: ExitCode.CLEAN,
    OutcomeKind.INTERRUPTED: ExitCode.INTERRUPTED,
}


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """The end of a run: `detail` is one sentence, `rip` where the guest was."""

    kind: OutcomeKind
    detail: str
    rip: int
    cycles: int

    @property
    def is_clean(self) -> bool:
        """Whether the guest ended its run itself, as it should."""
        return self.kind.exit_code == ExitCode.CLEAN
