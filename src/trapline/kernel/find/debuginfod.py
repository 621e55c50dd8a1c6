"""debuginfod: debug files by build id, from servers that DEBUGINFOD_URLS names.

What was fetched is kept in the cache; a server that does not answer in time, or answers with what
was not asked for, is asked no more. Without DEBUGINFOD_URLS nothing is asked.

Source: debuginfod(8), "WEBAPI": GET /buildid/BUILDID/debuginfo; debuginfod-find(1) for the
variables, of which DEBUGINFOD_TIMEOUT is in seconds without progress.
"""

import os
import re
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Final

from trapline.base import files
from trapline.base.errors import BadImageError, FetchError, OutputError
from trapline.base.printable import printable
from trapline.kernel.elf.file import MAX_KERNEL, ElfFile
from trapline.kernel.find.deb import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

URLS: Final = "DEBUGINFOD_URLS"
_TIMEOUT: Final = "DEBUGINFOD_TIMEOUT"
_SECONDS: Final = 90
# A server that sends less than this in the time is as good as one that hangs.
_PROGRESS: Final = 100 << 10  # bytes
_CHUNK: Final = 1 << 16
_BUILD_ID: Final = re.compile(r"[0-9a-f]{8,128}")
_LONGEST: Final = 120


class Debuginfod:
    """The servers; `problems` says in a sentence each why one is asked no more."""

    def __init__(self, announce: "Callable[[str], None] | None" = None) -> None:
        urls = os.environ.get(URLS, "").split()
        self._servers = [url.rstrip("/") for url in urls if url.startswith(("http://", "https://"))]
        self._announce = announce
        seconds = os.environ.get(_TIMEOUT, "")
        self._timeout = int(seconds) if re.fullmatch(r"[1-9]\d{0,4}", seconds) else _SECONDS
        self.problems: list[str] = []

    @property
    def is_on(self) -> bool:
        """Whether there is a server that can still be asked."""
        return bool(self._servers)

    def debug_file(self, build_id: str | None, what: str) -> Path | None:
        """Return the debug file of a build id, from the cache or a server; None where none has it.

        `what` is what it is told to be. Raises OutputError where the cache cannot be written.
        """
        if build_id is None or not _BUILD_ID.fullmatch(build_id):
            return None
        target = cache_folder() / "debuginfod" / build_id / "debuginfo"
        if target.exists():
            return target
        for server in tuple(self._servers):
            try:
                if self._fetch(f"{server}/buildid/{build_id}/debuginfo", target, what):
                    return self._checked(target, build_id, server)
            except (FetchError, BadImageError) as error:
                self._servers.remove(server)
                self.problems.append(
                    f"{printable(server)[:_LONGEST]} is not asked any more: {error}"
                )
        return None

    def _fetch(self, url: str, target: Path, what: str) -> bool:
        """Fetch one file; False where the server does not have it."""
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "trapline"})  # noqa: S310 - http and https only
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:  # noqa: S310
                size = answer.headers.get("Content-Length", "")
                if self._announce is not None:
                    told = f" ({int(size) >> 20:,} MB)" if re.fullmatch(r"\d{1,12}", size) else ""
                    self._announce(f"Fetching the debug information of {what}{told}.")
                target.parent.mkdir(parents=True, exist_ok=True)
                files.write_whole(target, self._received(answer.read, size))
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return False
            raise FetchError(f"it answers with status {error.code}.") from None
        except (urllib.error.URLError, HTTPException, ValueError, TimeoutError) as error:
            reason = getattr(error, "reason", error)
            raise FetchError(f"it cannot be read ({printable(str(reason))[:_LONGEST]}).") from None
        except OSError as error:
            raise OutputError(f"{target}: cannot be written: {files.why(error)}.") from None
        return True

    def _received(self, read: "Callable[[int], bytes]", size: str) -> "Iterator[bytes]":
        """Yield what comes, as long as it comes fast enough and is not too much."""
        total = since = 0
        start = monotonic()
        while data := read(_CHUNK):
            total += len(data)
            since += len(data)
            if total > MAX_KERNEL:
                raise FetchError("it sends more than any kernel has.")
            if since >= _PROGRESS:
                since, start = 0, monotonic()
            elif monotonic() - start > self._timeout:
                raise FetchError("it sends next to nothing.")
            yield data
        if size.isdecimal() and str(total) != size:
            raise FetchError("it breaks off.")

    def _checked(self, target: Path, build_id: str, server: str) -> Path:
        """Refuse, and forget, what is not what was asked for. Raises BadImageError."""
        try:
            with ElfFile.open(target) as elf:
                found = elf.build_id
        except BadImageError:
            found = None
        if found != build_id:
            target.unlink()
            del server
            raise BadImageError("it sent another file than was asked for.")
        return target
