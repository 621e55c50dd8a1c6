"""What belongs to a kernel's files and is elsewhere: its debug information, its code."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from trapline.base.errors import BadImageError, KernelNotFoundError, OutputError
from trapline.kernel.elf import bzimage
from trapline.kernel.elf.file import MAX_MODULE, SHT_PROGBITS, ElfFile
from trapline.kernel.find import buildid, joined, modulefiles
from trapline.kernel.find.debuginfod import Debuginfod
from trapline.kernel.find.kernelfiles import ModuleFile

Announce = Callable[[str], None]

_SYSTEM: Final = Path("/")


@dataclass(frozen=True, slots=True)
class Draft:
    """The files of a kernel as they were found, before it is said what is missing.

    `others` are further images of it; `roots` are where files by build id may be.
    """

    release: str | None
    vmlinux: Path | None
    vmlinuz: Path | None
    modules: tuple[ModuleFile, ...]
    modules_dir: Path | None
    configs: Sequence[Path]
    others: tuple[Path, ...] = ()
    roots: tuple[Path, ...] = ()
    problems: list[str] = field(default_factory=list)


def complete(draft: Draft, announce: Announce | None) -> Draft:
    """Add what can be found by build id, by debug link, or by debuginfod."""
    server = Debuginfod(announce)
    folders = buildid.trees((*draft.roots, _SYSTEM))
    try:
        vmlinux = _vmlinux(draft, folders, server, announce)
        modules = _modules(draft.modules, folders, server)
    except OutputError as error:
        # Without a cache it is what it was.
        draft.problems.append(str(error))
        return draft
    draft.problems.extend(server.problems)
    return replace(draft, vmlinux=vmlinux, modules=modules)


def _vmlinux(
    draft: Draft, folders: list[Path], server: Debuginfod, announce: Announce | None
) -> Path | None:
    """Return a vmlinux with code and debug information, as far as both are there."""
    images = [path for path in (draft.vmlinux, *draft.others) if path is not None]
    debug = next((path for path in images if modulefiles.has_dwarf(path)), None)
    code = next((path for path in images if _has_code(path)), None)
    if debug is None:
        debug = _debug_of(draft, code, folders, server)
    if debug is None:
        return code or draft.vmlinux
    if _has_code(debug):
        return debug
    return _joined(draft, debug, code, announce)


def _debug_of(
    draft: Draft, code: Path | None, folders: list[Path], server: Debuginfod
) -> Path | None:
    """Find the debug file of what there is of code."""
    source = code or draft.vmlinuz
    if source is None:
        return None
    with _open(source) as elf:
        build_id = elf.build_id
        found = buildid.by_build_id(build_id, folders)
        if found is not None:
            return found
        for place in buildid.by_link(elf, source, draft.roots):
            with ElfFile.open(place) as linked:
                if linked.build_id == build_id and modulefiles.has_dwarf(place):
                    return place
    return server.debug_file(build_id, draft.release or "this kernel") if server.is_on else None


def _joined(draft: Draft, debug: Path, code: Path | None, announce: Announce | None) -> Path:
    """Join a debug file with its code; return it as it is where that is not to be had."""
    for source in (code, draft.vmlinuz):
        if source is None:
            continue
        try:
            with _open(source) as elf:
                return joined.join(debug, elf, source, announce)
        except BadImageError as error:
            draft.problems.append(str(error))
        except OSError as error:
            draft.problems.append(f"{debug} could not be joined with its code: {error}.")
    return debug


def _open(path: Path) -> ElfFile:
    try:
        return ElfFile.open(path)
    except BadImageError:
        return bzimage.open_vmlinuz(path)


def _has_code(path: Path) -> bool:
    with ElfFile.open(path) as elf:
        sections = [s for s in elf.sections if s.is_alloc and s.is_executable and s.size]
        return all(section.type == SHT_PROGBITS for section in sections)


def _modules(
    modules: tuple[ModuleFile, ...], folders: list[Path], server: Debuginfod
) -> tuple[ModuleFile, ...]:
    """Give each stripped module the debug file of its build id."""
    if not folders and not server.is_on:
        return modules
    found = []
    for module in modules:
        debug = module.debug
        if debug is None:
            build_id = _build_id(module.path)
            debug = buildid.by_build_id(build_id, folders)
            if debug is None and server.is_on:
                debug = server.debug_file(build_id, f"the module {module.name}")
        found.append(ModuleFile(module.name, module.path, debug, module.location))
    return tuple(found)


def _build_id(path: Path) -> str | None:
    try:
        with ElfFile.open(path, limit=MAX_MODULE) as elf:
            return elf.build_id
    except (BadImageError, KernelNotFoundError):
        return None  # who scans it says what is wrong
