"""Exit codes and the one kind of exception a user is meant to see.

An error is one sentence that says what is wrong and what to do about it. Code raises the
subclass that fits; the command line prints its text and exits with its number. The table in
docs/exit-codes.md is checked against this module by a test.
"""

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What the process exits with; 0, 1 and 2 mean the same for every command."""

    CLEAN = 0
    FINDINGS = 1
    USAGE = 2
    KERNEL_NOT_FOUND = 10
    BAD_IMAGE = 11
    NO_DEBUG_INFO = 12
    FETCH_FAILED = 13
    BAD_INPUT_FILE = 14
    OUTPUT_FAILED = 15
    TOOL_MISSING = 16
    NOT_A_TDX_KERNEL = 17
    ENGINE_MISMATCH = 18
    BAD_MACHINE = 19
    GUEST_PANIC = 20
    GUEST_DOUBLE_FAULT = 21
    GUEST_TRIPLE_FAULT = 22
    GUEST_FATAL_ERROR = 23
    GUEST_HANG = 24
    GUEST_EPT_VIOLATION = 25
    TIMEOUT = 26
    FORBIDDEN_ACCESS = 27
    WORKERS_LOST = 28
    NOT_REPRODUCIBLE = 29
    OUT_OF_RESOURCES = 30
    INCOMPLETE = 31
    GUEST_COMPLAINED = 32
    INTERNAL = 70
    INTERRUPTED = 130
    TERMINATED = 143


class TraplineError(Exception):
    """Something the user can act upon; str() is the whole message, one sentence."""

    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL


class UsageError(TraplineError):
    """The command line asks for something that makes no sense."""

    exit_code = ExitCode.USAGE


class KernelNotFoundError(TraplineError):
    """No kernel, module folder or debug file where the user pointed."""

    exit_code = ExitCode.KERNEL_NOT_FOUND


class BadImageError(TraplineError):
    """A kernel, module or debug file that is truncated, corrupt, foreign or hostile."""

    exit_code = ExitCode.BAD_IMAGE


class NoDebugInfoError(TraplineError):
    """The question cannot be answered at all without DWARF."""

    exit_code = ExitCode.NO_DEBUG_INFO


class FetchError(TraplineError):
    """apt is missing, has no such package, or could not download it."""

    exit_code = ExitCode.FETCH_FAILED


class BadInputFileError(TraplineError):
    """An allow list, scenario, trace or result document that does not validate."""

    exit_code = ExitCode.BAD_INPUT_FILE


class OutputError(TraplineError):
    """The result could not be written: disk full, no permission, no such folder."""

    exit_code = ExitCode.OUTPUT_FAILED


class ToolMissingError(TraplineError):
    """A program that this option needs is not installed; the message names the package."""

    exit_code = ExitCode.TOOL_MISSING


class NotATdxKernelError(TraplineError):
    """The kernel was built without TDX guest support, so it cannot boot as a TD."""

    exit_code = ExitCode.NOT_A_TDX_KERNEL


class EngineMismatchError(TraplineError):
    """The installed CPU engine is not the build whose private layout is known."""

    exit_code = ExitCode.ENGINE_MISMATCH


class BadMachineError(TraplineError):
    """Memory size, initrd or device options that no TD can be built from."""

    exit_code = ExitCode.BAD_MACHINE


class WorkersLostError(TraplineError):
    """Worker processes keep dying, or a cluster went away; what is done is in the store."""

    exit_code = ExitCode.WORKERS_LOST


class NotReproducibleError(TraplineError):
    """The same run of a guest came out differently: a verdict would say nothing."""

    exit_code = ExitCode.NOT_REPRODUCIBLE


class ResourceError(TraplineError):
    """This machine has too little of something: memory, open files, processes, locks."""

    exit_code = ExitCode.OUT_OF_RESOURCES
