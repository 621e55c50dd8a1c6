"""Finding loadable modules in a folder, and the debug file that belongs to each."""

from pathlib import Path
from typing import Final

from trapline.base.printable import printable
from trapline.kernel.elf.file import MAX_KERNEL, MAX_MODULE, ElfFile
from trapline.kernel.find import layouts
from trapline.kernel.find.kernelfiles import ModuleFile

_SUFFIXES: Final = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")
_DEBUG_SUFFIXES: Final = (*_SUFFIXES, ".ko.debug")
# Of two modules of one name, depmod takes the one from updates/ (depmod.d, "search").
_PREFERRED: Final = ("updates", "extra", "weak-updates")


def module_name(path: Path) -> str:
    """Return the name `lsmod` prints for a module file, fit to print."""
    return printable(_stem(path.name, _DEBUG_SUFFIXES).replace("-", "_"))


def find_modules(folder: Path, prefix: str = "") -> tuple[ModuleFile, ...]:
    """Return the modules below `folder`, one per name, sorted by location.

    `prefix` goes before each location: "kernel/" for a build tree, whose modules are installed
    there. `debug` is set for modules that are not stripped.
    """
    found: dict[str, ModuleFile] = {}
    packed_has_debug: bool | None = None
    below = [path.relative_to(folder) for path in _walk(folder, _SUFFIXES)]
    for relative in sorted(below, key=_preference):
        path = folder / relative
        name = module_name(path)
        if name in found:
            continue
        if path.suffix == ".ko":
            has_debug = has_dwarf(path, MAX_MODULE)
        else:
            # Unpacking each only to look would take seconds; a folder is packed as a whole.
            if packed_has_debug is None:
                packed_has_debug = has_dwarf(path, MAX_MODULE)
            has_debug = packed_has_debug
        unpacked = relative.with_name(_stem(path.name, _SUFFIXES) + ".ko")
        location = prefix + printable(unpacked.as_posix())
        found[name] = ModuleFile(name, path, path if has_debug else None, location)
    return tuple(sorted(found.values(), key=lambda module: module.location))


def with_debug(modules: tuple[ModuleFile, ...], folder: Path) -> tuple[ModuleFile, ...]:
    """Give each stripped module the debug file of its name below `folder`, where there is one."""
    debug = {module_name(path): path for path in _walk(folder, _DEBUG_SUFFIXES)}
    return tuple(
        ModuleFile(m.name, m.path, m.debug or debug.get(m.name), m.location) for m in modules
    )


def has_dwarf(path: Path, limit: int = MAX_KERNEL) -> bool:
    """Whether an ELF file, compressed or not, has a .debug_info section with contents.

    `limit` is that of `ElfFile.open`.
    """
    with ElfFile.open(path, limit=limit) as elf:
        section = elf.section(".debug_info")
        return section is not None and section.file_size > 0


def _stem(name: str, suffixes: tuple[str, ...]) -> str:
    for suffix in sorted(suffixes, key=len, reverse=True):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def _walk(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files with one of the suffixes below a folder; links to folders are not followed."""
    return [path for path in layouts.walk(folder) if path.name.endswith(suffixes)]


def _preference(relative: Path) -> tuple[int, str]:
    first = relative.parts[0]
    order = _PREFERRED.index(first) if first in _PREFERRED else len(_PREFERRED)
    return order, relative.as_posix()
