"""Debug files by what the stripped file says of them: its build id, or its .gnu_debuglink.

Source: gdb's manual, "Debugging Information in Separate Files": DEBUG/.build-id/xx/yyyy.debug, and
beside the file, in .debug/ beside it, or below DEBUG at its own path.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Final

from trapline.base.printable import decode_name
from trapline.kernel.find import layouts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trapline.kernel.elf.file import ElfFile

_TREES: Final = ("usr/lib/debug/.build-id", ".build-id", "lib/debug/.build-id")
_MAX_NAME: Final = 255
_SHORTEST: Final = 8  # hexadecimal digits of a build id


def trees(roots: "Sequence[Path]") -> list[Path]:
    """List the folders below `roots` that have files by build id."""
    places = [root / tree for root in roots for tree in _TREES]
    return [place for place in places if layouts.is_folder(place)]


def by_build_id(build_id: str | None, folders: "Sequence[Path]") -> Path | None:
    """Find the debug file of a build id."""
    if build_id is None or len(build_id) < _SHORTEST:
        return None
    for folder in folders:
        place = folder / build_id[:2] / f"{build_id[2:]}.debug"
        if layouts.is_file(place):
            return place
    return None


def by_link(elf: "ElfFile", path: Path, roots: "Sequence[Path]") -> "Iterator[Path]":
    """Yield what the .gnu_debuglink of a file may mean, as far as it is there."""
    name = decode_name(bytes(elf.contents(".gnu_debuglink")).partition(b"\0")[0])
    if not name or "/" in name or len(name) > _MAX_NAME:
        return
    folder = path.absolute().parent
    below = [
        root / "usr/lib/debug" / folder.relative_to(root) for root in roots if _holds(root, folder)
    ]
    for place in (folder / name, folder / ".debug" / name, *(place / name for place in below)):
        if layouts.is_file(place) and not place.samefile(path):
            yield place


def _holds(root: Path, folder: Path) -> bool:
    return folder.is_relative_to(root)
