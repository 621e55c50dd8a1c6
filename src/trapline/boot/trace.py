"""The trace of a run: one JSON object per line, a header first.

    {"schema":"trapline/trace","version":1,"kernel":…,"command_line":…,…}
    {"n":1,"cycles":123,"kind":"ve","rip":"0x…","reason":"IO_INSTRUCTION",…}

The header holds all that determines the run, so that it can be replayed and compared line by
line. A line never depends on the wall clock.
"""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from trapline.base import encode
from trapline.base.errors import OutputError
from trapline.base.files import why, written
from trapline.machine.observe.recorder import TrapKind, TrapRecord
from trapline.machine.vmm.ghci import call_name
from trapline.tdx.vmm_interface import ExitReason

SCHEMA: Final = "trapline/trace"
VERSION: Final = 1
_REASONS: Final = {reason.value: reason.name for reason in ExitReason}


def describe(trap: TrapRecord) -> dict[str, str | int]:
    """Return the fields of one line, without its number."""
    line: dict[str, str | int] = {
        "cycles": trap.cycles,
        "kind": trap.kind.name.lower(),
        "rip": f"{trap.rip:#x}",
    }
    first, second, third, fourth = trap.details
    if trap.kind == TrapKind.VE:
        line["reason"] = _REASONS.get(trap.code, str(trap.code))
        line["qualification"] = f"{first:#x}"
        line["gla"] = f"{second:#x}"
        line["gpa"] = f"{third:#x}"
        line["length"] = fourth
    elif trap.kind == TrapKind.TDCALL:
        line["leaf"] = trap.code
        line["status"] = f"{first:#x}"
    else:
        line["leaf"] = call_name(trap.code)
        for name, value in zip(("r12", "r13", "r14", "r15"), trap.details, strict=True):
            line[name] = f"{value:#x}"
    return line


class TraceWriter:
    """Writes a trace beside its final name and renames it when it is whole.

    Use as a context manager; on an error the unfinished file is removed. What is there and is no
    regular file (a pipe, a device) is written to directly. Raises OutputError where the file
    cannot be written.
    """

    def __init__(self, path: Path, header: Mapping[str, object]) -> None:
        self._path = path
        self._header = header
        self._number = 0
        self._stack = ExitStack()
        self._file: IO[bytes]

    def __enter__(self) -> Self:
        try:
            self._file = self._stack.enter_context(written(self._path))
        except OSError as error:
            raise self._failed(error) from None
        try:
            self._write({"schema": SCHEMA, "version": VERSION, **self._header})
        except BaseException:
            self._stack.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._stack.__exit__(kind, error, traceback)
        except OSError as problem:
            raise self._failed(problem) from None

    def __call__(self, trap: TrapRecord) -> None:
        """Write one trap."""
        self._number += 1
        self._write({"n": self._number, **describe(trap)})

    def _write(self, line: Mapping[str, object]) -> None:
        try:
            self._file.write(encode.json(line) + b"\n")
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"{self._path}: the trace cannot be written: {why(error)}.")
