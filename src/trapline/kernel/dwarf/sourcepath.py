"""Source paths as kernel developers write them: relative to the top of the source tree.

DWARF holds a compilation folder, an include folder and a file name. What they look like depends
on how the kernel was built: in its tree ("drivers/net/virtio_net.c"), in a folder beside it
("../drivers/…", or absolute), with -ffile-prefix-map as Debian does.
"""

import posixpath
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

# Every kernel object has code from one of these: headers for C, its own folder for assembly.
_LANDMARKS: Final = ("/arch/x86/", "/include/linux/")


class SourceTree:
    """Knows where the top of the tree is, from the folders that one file's DWARF mentions."""

    def __init__(self, folders: "Iterable[str]") -> None:
        self._root = _find_root(folders)

    def relative(self, compilation: str | None, folder: str | None, file: str | None) -> str | None:
        """Return the path below the top of the tree, or the path as it is outside of it."""
        if not file:
            return None
        path = posixpath.normpath(posixpath.join(folder or "", file))
        for root in (self._root, compilation):
            if root and path.startswith(root + "/"):
                return path[len(root) + 1 :]
        return path


def _find_root(folders: "Iterable[str]") -> str | None:
    roots = {
        folder[:position]
        for folder in (posixpath.normpath(folder) + "/" for folder in folders)
        for landmark in _LANDMARKS
        if (position := folder.find(landmark)) > 0
    }
    # tools/ has folders of the same names, below the one looked for.
    return min(roots, key=lambda root: (len(root), root), default=None)
