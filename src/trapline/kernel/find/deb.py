"""Debian packages as a source of kernels: found, downloaded and unpacked into a cache.

A meta-package (linux-image-6.12-cloud-amd64) leads to the image of the newest release it stands
for; packages that hold the image's modules and its debug information are added. Each package is
unpacked once, to CACHE/packages/NAME_VERSION: beside first, then renamed, so that a folder of
that name is complete. What is in the cache is used without asking the network.
"""

import difflib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from trapline.base import decode, files
from trapline.base.errors import BadInputFileError, FetchError, OutputError
from trapline.kernel.find.apt import Apt, Package

Announce = Callable[[str], None]
Show = Callable[[str], tuple[Package, ...]]

_SUITE: Final = re.compile(r"[a-z][a-z0-9.-]{1,63}\Z")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9+.-]+\Z")
# An image and what a distribution splits off from it: Ubuntu has linux-modules-RELEASE.
_PARTS: Final = re.compile(r"linux-(image|modules|binary)-")
_DEBUG_SUFFIXES: Final = ("-dbg", "-dbgsym")
_MAX_PACKAGES: Final = 16
_LISTS_SIZE: Final = "some 10 to 30 MB"
_LISTS_ROOM: Final = 150_000_000  # bytes; apt unpacks the lists and makes an index of them
_COMPLETE: Final = ".trapline-complete"
_MAX_RECORD: Final = 1 << 16  # bytes


def fetch_kernel(
    spec: str,
    *,
    announce: Announce | None = None,
    cache: Path | None = None,
) -> tuple[Path, ...]:
    """Return the unpacked trees of a kernel: image first, then modules, then debug files.

    `spec` names a package, or alternatives as "A|B" of which the first one apt knows is taken; with
    "@SUITE" behind it they are taken from that suite of Debian, whatever the system's are.
    `announce` is told in one line what is about to be downloaded and how large it is. `cache`
    replaces `cache_folder()`. Raises FetchError, or OutputError where the cache cannot be
    written.
    """
    return _fetch(spec, resolve_kernel, announce, cache)


def fetch_package(
    name: str,
    *,
    announce: Announce | None = None,
    cache: Path | None = None,
) -> Path:
    """Return the unpacked tree of one package, such as busybox-static, without dependencies.

    Parameters and errors are those of `fetch_kernel`.
    """
    return _fetch(name, _resolve_plain, announce, cache)[0]


def cache_folder() -> Path:
    """Return trapline's folder below XDG_CACHE_HOME, or else below ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification tells to ignore relative paths.
    if given and Path(given).is_absolute():
        return Path(given, "trapline")
    try:
        return Path.home() / ".cache" / "trapline"
    except RuntimeError:
        raise OutputError("There is no home folder; set XDG_CACHE_HOME.") from None


def resolve_kernel(name: str, show: Show) -> list[Package]:
    """Return the packages that make up a kernel, [] where `name` is unknown.

    `show` gives all versions of a package, candidate first. The image comes first; a debug
    package of the image's own version is preferred to the candidate.
    """
    versions = show(name)
    if not versions:
        return []
    found: list[Package] = []
    pending = [versions[0]]
    seen = {name}
    while pending and len(seen) <= _MAX_PACKAGES:
        package = pending.pop(0)
        parts = [part for part in package.depends if _PARTS.match(part) and part not in seen]
        seen.update(parts)
        pending.extend(candidates[0] for part in parts if (candidates := show(part)))
        # A meta-package has nothing but the dependency on an image.
        if not any(part.startswith("linux-image-") for part in parts):
            found.append(package)
    debug = [
        _same_version(candidates, package.version)
        for package in found
        for suffix in _DEBUG_SUFFIXES
        if (candidates := show(package.name + suffix))
    ]
    return found + debug


def _same_version(candidates: Sequence[Package], version: str) -> Package:
    return next((one for one in candidates if one.version == version), candidates[0])


def _resolve_plain(name: str, show: Show) -> list[Package]:
    return list(show(name)[:1])


def _fetch(
    spec: str,
    resolve: Callable[[str, Show], list[Package]],
    announce: Announce | None,
    cache: Path | None,
) -> tuple[Path, ...]:
    say = announce or _silent
    names, suite = _parse(spec)
    folder = cache or cache_folder()
    record = _record(folder, names, suite, resolve)
    with _lock(folder) as lock:
        if not lock.is_free():
            # What this name led to last time is as good as what apt would say now.
            if known := _recorded(record, folder / "packages"):
                return known
            say(f"Waiting for another process that fetches packages into {folder}.")
            lock.wait()
        apt = Apt(folder / ("apt" if suite is None else f"apt-{suite}"), suite=suite)
        packages = _find(names, apt, resolve, say, folder)
        store = folder / "packages"
        absent = [package for package in packages if not _is_complete(store, package)]
        if absent:
            _check_space(absent, store)
            say(_describe(absent, store))
            for package in absent:
                _install(package, store, apt)
        _write_record(record, packages)
        return tuple(store / package.folder_name for package in packages)


def _silent(line: str) -> None:
    del line


def _parse(spec: str) -> tuple[list[str], str | None]:
    packages, at, suite = spec.partition("@")
    if at and not _SUITE.match(suite):
        raise FetchError(
            f'"{suite}" is no suite; write deb:PACKAGE@SUITE, as in @trixie-backports.'
        )
    names = [name.strip() for name in packages.split("|")]
    bad = next((name for name in names if not _NAME.match(name)), None)
    if bad is not None:
        raise FetchError(f'"{bad}" is not a package name; write deb:PACKAGE or deb:A|B.')
    return names, suite or None


def _find(
    names: list[str],
    apt: Apt,
    resolve: Callable[[str, Show], list[Package]],
    say: Announce,
    folder: Path,
) -> list[Package]:
    """Resolve the first name apt knows; fetch the package lists where they are needed."""
    problems = ""
    stale = apt.has_lists
    if not stale:
        _require_space(_LISTS_ROOM, folder)
        say(f"Fetching apt's package lists ({_LISTS_SIZE}).")
        problems = apt.update()
    packages = _first_known(names, apt, resolve)
    if not packages and stale:
        _require_space(_LISTS_ROOM, folder)
        say(f"Fetching apt's package lists again ({_LISTS_SIZE}).")
        problems = apt.update()
        packages = _first_known(names, apt, resolve)
    if not packages:
        raise FetchError(_unknown(names, apt, problems))
    return packages


def _first_known(
    names: list[str], apt: Apt, resolve: Callable[[str, Show], list[Package]]
) -> list[Package]:
    return next((found for name in names if (found := resolve(name, apt.show))), [])


def _unknown(names: list[str], apt: Apt, problems: str) -> str:
    wanted = " or ".join(names)
    near = difflib.get_close_matches(
        names[0], apt.names("linux-image-" if "linux" in names[0] else names[0][:3]), n=3
    )
    if near:
        return f"apt knows no package {wanted}; near to it are {', '.join(near)}."
    reason = f" ({problems})" if problems else ""
    return f"apt knows no package {wanted}; check the sources in /etc/apt{reason}."


def _describe(packages: list[Package], store: Path) -> str:
    listing = ", ".join(f"{p.name} {p.version} ({_megabytes(p.size)})" for p in packages)
    unpacked = _megabytes(sum(package.installed for package in packages))
    return f"Downloading {listing}; unpacked {unpacked} in {store}."


def _megabytes(size: int) -> str:
    return f"{max(1, round(size / 1e6))} MB"


def _check_space(packages: list[Package], store: Path) -> None:
    _require_space(sum(package.size + package.installed for package in packages), store)


def _require_space(needed: int, store: Path) -> None:
    """Refuse at once what apt would try for minutes; `needed` is in bytes."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(store).free
    except OSError as error:
        raise OutputError(f"{store}: cannot be written: {error.strerror}.") from None
    if free < needed:
        raise OutputError(
            f"{store}: {_megabytes(needed)} are needed and {_megabytes(free)} are free; make "
            "room, or set XDG_CACHE_HOME to another disk."
        )


def _is_complete(store: Path, package: Package) -> bool:
    return (store / package.folder_name / _COMPLETE).is_file()


def _install(package: Package, store: Path, apt: Apt) -> None:
    """Download and unpack beside the final folder, then rename."""
    final = store / package.folder_name
    try:
        with tempfile.TemporaryDirectory(prefix=".new-", dir=store) as temporary:
            work = Path(temporary)
            tree = work / "tree"
            archive = _download(package, work, apt)
            apt.unpack(archive, tree)
            (tree / _COMPLETE).touch()
            if final.exists():
                shutil.rmtree(final)
            tree.rename(final)
    except OSError as error:
        raise OutputError(f"{final}: cannot be written: {error.strerror}.") from None


def _download(package: Package, folder: Path, apt: Apt) -> Path:
    """Download once more with fresh lists where the archive no longer has this version."""
    try:
        return apt.download(package, folder)
    except FetchError:
        apt.update()
        if package.version not in {known.version for known in apt.show(package.name)}:
            raise FetchError(
                f"{package.name} {package.version} is no longer in the archive, and apt's lists "
                "are renewed now; run the command once more."
            ) from None
        return apt.download(package, folder)


class _Lock:
    """Lets one process at a time use the private apt and fill the cache."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def is_free(self) -> bool:
        """Take the lock if no other process has it; say whether it is taken now."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def wait(self) -> None:
        """Take the lock once the other process is done."""
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)


@contextmanager
def _lock(folder: Path) -> Iterator[_Lock]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}.") from None
    try:
        yield _Lock(descriptor)
    finally:
        os.close(descriptor)


def _record(
    folder: Path,
    names: list[str],
    suite: str | None,
    resolve: Callable[[str, Show], list[Package]],
) -> Path:
    """Return where it is written down which packages the names led to."""
    wanted = f"{resolve.__name__} {'|'.join(names)}" + (f" @{suite}" if suite else "")
    return folder / "resolved" / hashlib.sha256(wanted.encode()).hexdigest()


def _write_record(record: Path, packages: list[Package]) -> None:
    try:
        record.parent.mkdir(exist_ok=True)
        files.write_whole(record, (f"{package.folder_name}\n".encode() for package in packages))
    except OSError as error:
        raise OutputError(f"{record}: cannot be written: {error.strerror}.") from None


def _recorded(record: Path, store: Path) -> tuple[Path, ...]:
    """Return the trees of a record, () where there is none or one of them is not complete."""
    try:
        data = files.read(record, limit=_MAX_RECORD, what="a record of packages")
        names = decode.text(data, str(record)).splitlines()
    except BadInputFileError:
        return ()
    trees = tuple(store / Path(name).name for name in names)
    return trees if all((tree / _COMPLETE).is_file() for tree in trees) else ()
