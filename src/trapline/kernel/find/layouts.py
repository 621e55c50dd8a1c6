"""Where distributions put the parts of a kernel, below the root of a system or a package tree.

Debian and Ubuntu: boot/, usr/lib/debug/boot, usr/lib/debug/lib/modules. Fedora, RHEL:
lib/modules/RELEASE/vmlinuz, usr/lib/debug/lib/modules/RELEASE/vmlinux and *.ko.debug. openSUSE:
usr/lib/debug/boot/vmlinux-RELEASE.debug. Arch: usr/lib/modules/RELEASE/vmlinuz and build/vmlinux.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

# In order of preference: files with debug information first.
VMLINUX: Final = (
    "usr/lib/debug/boot/vmlinux-{release}",
    "usr/lib/debug/lib/modules/{release}/vmlinux",
    "usr/lib/debug/usr/lib/modules/{release}/vmlinux",
    "usr/lib/debug/lib/modules/{release}/vmlinux.debug",
    "usr/lib/debug/usr/lib/modules/{release}/vmlinux.debug",
    "usr/lib/debug/boot/vmlinux-{release}.debug",
    "usr/lib/debug/vmlinux-{release}",
    "usr/lib/modules/{release}/build/vmlinux",
    "lib/modules/{release}/build/vmlinux",
    "usr/lib/modules/{release}/vmlinux",
    "lib/modules/{release}/vmlinux",
    "boot/vmlinux-{release}",
    "boot/vmlinux-{release}.xz",
    "boot/vmlinux-{release}.zst",
    "boot/vmlinux-{release}.gz",
    "usr/lib/modules/{release}/vmlinux.xz",
    "usr/lib/modules/{release}/vmlinux.zst",
    "lib/modules/{release}/vmlinux.xz",
    "lib/modules/{release}/vmlinux.zst",
)
VMLINUZ: Final = (
    "boot/vmlinuz-{release}",
    "usr/lib/modules/{release}/vmlinuz",
    "lib/modules/{release}/vmlinuz",
    "boot/bzImage-{release}",
)
MODULES: Final = ("usr/lib/modules/{release}", "lib/modules/{release}")
DEBUG_MODULES: Final = (
    "usr/lib/debug/lib/modules/{release}",
    "usr/lib/debug/usr/lib/modules/{release}",
)
CONFIG: Final = (
    "boot/config-{release}",
    "usr/lib/modules/{release}/config",
    "lib/modules/{release}/config",
    "usr/lib/modules/{release}/build/.config",
    "lib/modules/{release}/build/.config",
)
_ALL: Final = sorted(
    VMLINUX + VMLINUZ + MODULES + DEBUG_MODULES, key=lambda pattern: -pattern.count("/")
)
_RELEASE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,127}\Z")
# How the name of a file ends that is another form of one with a release.
_NO_RELEASES: Final = (".debug", ".old", ".bak", ".xz", ".zst", ".gz", ".bz2")
_MADE_UP: Final = frozenset({"dev", "proc", "sys"})
# What tells a release from another folder below lib/modules or a file of another kind in boot.
_NUMBERED: Final = re.compile(r"\d+\.\d+")


def is_release(name: str) -> bool:
    """Whether `name` can be what `uname -r` prints."""
    return _RELEASE.match(name) is not None


def is_file(path: Path) -> bool:
    """Whether a regular file is there; False where a folder on the way may not be read."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether a folder is there; False where a folder on the way may not be read."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_special(path: Path) -> bool:
    """Whether something is there that is neither a file nor a folder: a device, a pipe, a socket.

    False where a folder on the way may not be read.
    """
    try:
        return path.exists() and not (path.is_file() or path.is_dir())
    except OSError:
        return False


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder; links to folders are not followed.

    A folder that may not be read, or goes away meanwhile, is passed over. Of a whole system, what
    the kernel makes up is left out: it has no end.
    """
    for place, folders, files in os.walk(folder):
        left_out = _MADE_UP if place == "/" else {".git"}
        folders[:] = [name for name in folders if name not in left_out]
        yield from (Path(place, name) for name in files)


def find_files(roots: Sequence[Path], patterns: Iterable[str], release: str) -> list[Path]:
    """Return the files of `release` that exist, by preference of pattern, then of root."""
    places = [root / pattern.format(release=release) for pattern in patterns for root in roots]
    return [place for place in places if is_file(place)]


def find_folders(roots: Sequence[Path], patterns: Iterable[str], release: str) -> list[Path]:
    """Return the folders of `release` that exist, each once even if linked to twice."""
    places = [root / pattern.format(release=release) for pattern in patterns for root in roots]
    found = {place.resolve(): place for place in reversed(places) if is_folder(place)}
    return [place for place in places if place in found.values()]


def releases(roots: Sequence[Path]) -> list[str]:
    """Name the releases of which any part is below `roots`, sorted."""
    found: set[str] = set()
    for pattern in VMLINUX + VMLINUZ + MODULES + DEBUG_MODULES:
        found.update(
            release for root in roots for release in _matching(root, PurePosixPath(pattern).parts)
        )
    return sorted(found)


def split(path: Path) -> tuple[Path, str] | None:
    """Return the root and the release if `path` ends as one of the known places does."""
    parts = path.absolute().parts
    for pattern in _ALL:
        wanted = PurePosixPath(pattern).parts
        if len(parts) <= len(wanted):
            continue
        tail = parts[-len(wanted) :]
        release = _captured(wanted, tail)
        if release is not None:
            return Path(*parts[: -len(wanted)]), release
    return None


def _matching(root: Path, wanted: tuple[str, ...]) -> list[str]:
    """Releases for which the place of one pattern exists below `root`."""
    at = next(i for i, part in enumerate(wanted) if "{release}" in part)
    folder = root.joinpath(*wanted[:at])
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return []
    found = []
    for name in names:
        release = _captured(wanted[at : at + 1], (name,))
        if release is not None and (
            at + 1 == len(wanted) or is_file(folder.joinpath(name, *wanted[at + 1 :]))
        ):
            found.append(release)
    return found


def _captured(wanted: tuple[str, ...], parts: tuple[str, ...]) -> str | None:
    """Match path parts against pattern parts and return what stands for the release."""
    release = None
    for want, part in zip(wanted, parts, strict=True):
        before, placeholder, after = want.partition("{release}")
        if not placeholder:
            if part != want:
                return None
            continue
        if not (part.startswith(before) and part.endswith(after)):
            return None
        release = part[len(before) : len(part) - len(after)]
        if not (is_release(release) and _NUMBERED.match(release)):
            return None
        if not after and release.endswith(_NO_RELEASES):
            return None
    return release
