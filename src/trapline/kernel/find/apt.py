"""apt with private folders: no root, and nothing of the system is changed.

Sources and keyrings are the system's (/etc/apt), but for another suite of Debian; lists, caches,
status and logs are in a folder of our own, and the hooks that distributions attach to
`apt-get update` are cleared, as those write to the system's folders. Packages are always those of
amd64.

Source: apt.conf(5), apt-get(8), apt-cache(8); deb822(5) for the stanzas.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trapline.base.errors import BadInputFileError, FetchError, OutputError
from trapline.base.files import read, write_whole

Runner = Callable[[Sequence[str], Path], "subprocess.CompletedProcess[str]"]

_CONFIGURATION: Final = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Architectures;
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::State "{folder}/state";
Dir::State::lists "{folder}/lists";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Dir::Cache::archives "{folder}/archives";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
Dir::Log "{folder}/log";
"""
# A suite that the system has no source for: from the mirror that it has others from.
_OTHER_SUITE: Final = """\
Dir::Etc::SourceList "{folder}/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
"""
_KEYS: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
_DEBIAN: Final = "http://deb.debian.org/debian"
_ARCHIVE: Final = re.compile(r"\bhttps?://[^\s\"\]]+/debian(?=/?(?:\s|$))")
_MAX_SOURCES: Final = 1 << 20  # bytes of one file
_FULL_DISK: Final = ("No space left on device", "Disk quota exceeded", "enough free space")


@dataclass(frozen=True, slots=True)
class Package:
    """One version of a binary package. `size` is the download in bytes, `installed` unpacked.

    `depends` are the names in Depends, first alternatives only, without versions.
    """

    name: str
    version: str
    size: int
    installed: int
    depends: tuple[str, ...]

    @property
    def folder_name(self) -> str:
        """PACKAGE_VERSION, as a name for a folder."""
        return f"{self.name}_{self.version.replace(':', '%3a')}"


class Apt:
    """apt-get and apt-cache over private folders below `folder`."""

    def __init__(
        self,
        folder: Path,
        run: Runner | None = None,
        *,
        suite: str | None = None,
        etc: Path = Path("/etc/apt"),
    ) -> None:
        """Take the system's sources, or those of one suite of Debian."""
        self._folder = folder
        self._run = run or run_program
        self._shown: dict[str, tuple[Package, ...]] = {}
        self._configuration = folder / "apt.conf"
        # apt puts the value between quotes and knows no escape.
        if '"' in str(folder):
            raise OutputError(f'{folder}: a cache folder must not have a " in its name.')
        try:
            for part in ("state", "lists/partial", "cache", "archives/partial", "log"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / "status").touch()
            text = _CONFIGURATION.format(folder=folder)
            if suite is not None:
                text += _OTHER_SUITE.format(folder=folder)
                line = f"deb [arch=amd64 signed-by={_KEYS}] {mirror(etc, suite)} {suite} main\n"
                write_whole(folder / "sources.list", [line.encode()])
            write_whole(self._configuration, [os.fsencode(text)])
        except OSError as error:
            raise OutputError(f"{folder}: cannot be written: {error.strerror}.") from None

    @property
    def has_lists(self) -> bool:
        """Whether package lists were fetched before."""
        return any((self._folder / "lists").glob("*_Packages*"))

    def update(self) -> str:
        """Fetch the package lists; return what apt complained of.

        One source of several that fails is no error: the others may have what is wanted.
        """
        self._shown.clear()
        done = self._apt("apt-get", "-q", "update")
        problems = _complaints(done.stderr)
        if done.returncode and not self.has_lists:
            _raise_if_full(done.stderr, self._folder)
            reason = problems or "is the network up?"
            raise FetchError(f"apt could not fetch its package lists ({reason}).")
        return problems

    def show(self, name: str) -> tuple[Package, ...]:
        """Return all versions of a package, the candidate first; empty where there is none."""
        if name not in self._shown:
            # The first of all versions is the newest; what apt's pins prefer may be another.
            candidate = self._stanzas("--no-all-versions", name)
            others = self._stanzas("--all-versions", name) if candidate else ()
            self._shown[name] = tuple(dict.fromkeys((*candidate, *others)))
        return self._shown[name]

    def _stanzas(self, versions: str, name: str) -> tuple[Package, ...]:
        return parse_stanzas(self._apt("apt-cache", versions, "show", "--", name).stdout, name)

    def names(self, prefix: str) -> list[str]:
        """Return the names of all packages that start with `prefix`."""
        return self._apt("apt-cache", "pkgnames", "--", prefix).stdout.split()

    def download(self, package: Package, folder: Path) -> Path:
        """Download a package into `folder` and return its .deb; apt checks its signature."""
        wanted = f"{package.name}={package.version}"
        done = self._apt("apt-get", "-q", "download", "--", wanted, folder=folder)
        found = sorted(folder.glob("*.deb"))
        if done.returncode or not found:
            _raise_if_full(done.stderr, folder)
            reason = _complaints(done.stderr) or f"exit status {done.returncode}"
            raise FetchError(f"apt could not download {wanted} ({reason}).")
        return found[0]

    def unpack(self, archive: Path, tree: Path) -> None:
        """Unpack a .deb into a new folder `tree`."""
        done = self._run(["dpkg-deb", "-x", str(archive), str(tree)], self._folder)
        if done.returncode:
            _raise_if_full(done.stderr, tree.parent)
            raise FetchError(
                f"{archive.name} could not be unpacked ({_complaints(done.stderr)}); try again."
            )

    def _apt(
        self, program: str, *arguments: str, folder: Path | None = None
    ) -> "subprocess.CompletedProcess[str]":
        return self._run(
            [program, "-c", str(self._configuration), *arguments], folder or self._folder
        )


def mirror(etc: Path, suite: str) -> str:
    """Name the archive of a suite: on the mirror that the system's sources in `etc` have."""
    names = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
    found = _DEBIAN
    for path in (name for name in names if name.suffix in {".list", ".sources"}):
        try:
            data = read(path, limit=_MAX_SOURCES, what="a list of sources")
        except BadInputFileError:
            continue
        lines = data.decode("utf-8", "replace").splitlines()
        match = _ARCHIVE.search("\n".join(line for line in lines if not line.startswith("#")))
        if match is not None:
            found = match[0]
            break
    return f"{found}-security" if suite.endswith("-security") else found


def run_program(arguments: Sequence[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run apt or dpkg-deb in `folder` and capture its output."""
    if shutil.which(arguments[0]) is None:
        raise FetchError(
            f"{arguments[0]} is not installed, so deb: names cannot be fetched; give a path to a "
            "kernel instead."
        )
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(
        arguments,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def parse_stanzas(text: str, name: str) -> tuple[Package, ...]:
    """Parse the output of `apt-cache show`; stanzas of other packages are left out."""
    found = []
    for stanza in text.split("\n\n"):
        fields: dict[str, str] = {}
        for line in stanza.splitlines():
            key, colon, value = line.partition(":")
            if colon and not line.startswith((" ", "\t")):
                fields[key] = value.strip()
        if fields.get("Package") == name and fields.get("Version"):
            found.append(
                Package(
                    name,
                    fields["Version"],
                    _number(fields.get("Size")),
                    _number(fields.get("Installed-Size")) << 10,
                    _depends(fields.get("Depends", "")),
                )
            )
    return tuple(found)


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() else 0


def _depends(text: str) -> tuple[str, ...]:
    names = (item.split("|")[0].split("(")[0].split(":")[0].strip() for item in text.split(","))
    return tuple(name for name in names if name)


def _complaints(stderr: str) -> str:
    """Join apt's error lines, or else its warnings, into one short line."""
    for mark in ("E: ", "W: ", ""):
        lines = [line for line in stderr.splitlines() if line.startswith(mark) and line.strip()]
        if lines:
            return "; ".join(line.removeprefix(mark).strip() for line in lines[:2])[:300]
    return ""


def _raise_if_full(stderr: str, folder: Path) -> None:
    if any(mark in stderr for mark in _FULL_DISK):
        raise OutputError(
            f"{folder}: the disk is full; make room, or set XDG_CACHE_HOME to another disk."
        )
