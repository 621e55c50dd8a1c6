"""Finding a kernel from what a user calls it: a file, a folder, a release, a Debian package."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal

from trapline.base.errors import BadImageError, KernelNotFoundError
from trapline.base.files import read, why
from trapline.base.mapping import mapped
from trapline.base.printable import decode_name
from trapline.base.scarcity import scarce
from trapline.kernel.elf import bzimage
from trapline.kernel.elf.file import ElfFile
from trapline.kernel.find import deb, distributions, kconfig, layouts, modulefiles
from trapline.kernel.find.companions import Draft, complete
from trapline.kernel.find.kernelfiles import KernelFiles, ModuleFile

Announce = Callable[[str], None]
Kind = Literal["vmlinux", "vmlinuz", "module"]

DEB: Final = "deb:"
_BANNER: Final = re.compile(rb"Linux version ([0-9]\S{0,127}) \(")
# Without a number it is the text init/version.c has before a link: "# SMP …".
_BUILD: Final = re.compile(rb"Linux version [0-9][^\n\0#]{0,512}#([0-9][^\n\0]{0,256})")
_VERMAGIC: Final = re.compile(rb"(?:^|\0)vermagic=([0-9]\S{0,127}) ")
_IMAGE_NAMES: Final = ("vmlinux", "vmlinuz", "bzImage")
_BOOT_IMAGES: Final = ("arch/x86/boot/bzImage", "arch/x86_64/boot/bzImage")
# A file that lib/modules/RELEASE of every packaged kernel has.
_HOME_MARK: Final = "modules.builtin.modinfo"
_NAMED: Final = 5  # kernels, in a message
_MAX_TEXT: Final = 8 << 20
_KERNEL_HALF: Final = 1 << 63  # user space is below: Documentation/arch/x86/x86_64/mm.rst
_BUILD_MARKS: Final = (".config", "Module.symvers", "include/config/kernel.release")


def locate(
    spec: str,
    modules: Path | None = None,
    *,
    announce: Announce | None = None,
    root: Path = Path("/"),
) -> KernelFiles:
    """Find the files of the kernel that `spec` names.

    `spec` is a vmlinux, a vmlinuz or a module (compressed or not); a folder: a build tree, an
    unpacked package, or lib/modules/RELEASE; a release, looked up below `root` where
    distributions install kernels and debug files; or deb:PACKAGE, where "A|B" gives
    alternatives as in a Debian dependency. `modules` is a folder to take the modules from
    instead. `announce` is told in one line what is about to be downloaded.

    Raises KernelNotFoundError where nothing is there, FetchError where a package cannot be had,
    BadImageError where a file is unsound. A part that is missing is no error: it is recorded.
    """
    try:
        found = _locate(spec, modules, announce, root)
        return found if isinstance(found, KernelFiles) else _finish(complete(found, announce))
    except OSError as error:  # a folder that went away while it was searched, or may not be
        message = f"{spec}: cannot be searched: {why(error)}."
        raise scarce(error) or KernelNotFoundError(message) from None


def _locate(
    spec: str, modules: Path | None, announce: Announce | None, root: Path
) -> Draft | KernelFiles:
    if spec.startswith(DEB):
        trees = deb.fetch_kernel(spec.removeprefix(DEB), announce=announce)
        return _from_roots(trees, spec, modules)
    path = Path(spec)
    if spec and layouts.is_folder(path):
        return _from_folder(path, modules)
    if layouts.is_file(path):
        return _from_file(path, modules)
    if spec and layouts.is_special(path):
        raise KernelNotFoundError(f"{spec}: is neither a regular file nor a folder.")
    if not layouts.is_release(spec):
        raise KernelNotFoundError(
            f"{spec}: no such file or folder; give a vmlinux, a vmlinuz, a folder, a release or "
            "deb:PACKAGE."
        )
    return _from_release(spec, modules, root)


def kind_of(path: Path) -> tuple[Kind, str | None]:
    """Tell by its contents what a file is, and of which release.

    Raises BadImageError where it is neither a kernel nor a module.
    """
    with mapped(path) as data:
        if bzimage.is_boot_image(data):
            return "vmlinuz", bzimage.read_setup_header(data, name=str(path)).release
    with ElfFile.open(path) as elf:
        if elf.is_relocatable:
            return "module", _first_match(_VERMAGIC, elf, ".modinfo")
        code = [section for section in elf.sections if section.is_alloc and section.is_executable]
        if code and all(section.address < _KERNEL_HALF for section in code):
            raise BadImageError(
                f"{path}: is a program or a library, not a kernel; give a vmlinux, a vmlinuz or a "
                "module."
            )
        return "vmlinux", _first_match(_BANNER, elf, ".rodata")


def _first_match(pattern: re.Pattern[bytes], elf: ElfFile, section: str) -> str | None:
    match = pattern.search(elf.contents(section))
    return None if match is None else decode_name(match[1])


def _from_release(release: str, modules: Path | None, root: Path) -> Draft:
    known = layouts.releases([root])
    if release not in known:
        near = f" (installed: {', '.join(known[:5])})" if known else ""
        raise KernelNotFoundError(
            f"{release}: no kernel of this release in {root / 'boot'}, {root / 'lib/modules'} or "
            f"{root / 'usr/lib/debug'}{near}; give a path or deb:linux-image-{release}."
        )
    return _assemble([root], release, modules)


def _from_roots(roots: Sequence[Path], spec: str, modules: Path | None) -> Draft:
    found = layouts.releases(roots)
    if not found:
        raise KernelNotFoundError(f"{spec}: holds no kernel, modules or debug files.")
    if len(found) > 1:
        raise KernelNotFoundError(
            f"{spec}: holds several kernels ({_some(found)}); name the vmlinux or "
            "lib/modules folder of one of them."
        )
    return _assemble(roots, found[0], modules)


def _from_folder(folder: Path, modules: Path | None) -> Draft:
    if layouts.is_file(folder / "vmlinux") and any(
        layouts.is_file(folder / mark) for mark in _BUILD_MARKS
    ):
        return _from_build_tree(folder, modules)
    if layouts.releases([folder]):
        return _from_roots([folder], str(folder), modules)
    installed = layouts.split(folder)
    if installed is not None:
        return _assemble([installed[0]], installed[1], modules)
    return _from_flat_folder(folder, modules)


def _from_build_tree(tree: Path, modules: Path | None) -> Draft:
    boot_images = [tree / name for name in _BOOT_IMAGES if layouts.is_file(tree / name)]
    vmlinux = tree / "vmlinux"
    release_file = tree / "include/config/kernel.release"
    if layouts.is_file(release_file):
        release: str | None = decode_name(_read(release_file)[:128].strip())
    else:
        release = kind_of(vmlinux)[1]
    if modules is None:
        found, folder = modulefiles.find_modules(tree, prefix="kernel/"), tree
    else:
        found, folder = _given_modules(modules, release)
    return Draft(
        release,
        vmlinux,
        boot_images[0] if boot_images else None,
        found,
        folder,
        [tree / ".config"] if layouts.is_file(tree / ".config") else [],
        roots=(tree,),
    )


def _from_flat_folder(folder: Path, modules: Path | None) -> Draft:
    """Take a folder of no known layout: the images in it by contents, and all modules below.

    Where whole kernels are somewhere below it, take the only one.
    """
    marks = (path for path in layouts.walk(folder) if path.name == _HOME_MARK)
    below = sorted({place for path in marks if (place := _root_of(path))})
    if len(below) > 1:
        raise KernelNotFoundError(
            f"{folder}: holds several kernels ({_some([release for _, release in below])}); "
            "name the folder of one of them."
        )
    if below:
        return _assemble([below[0][0]], below[0][1], modules)
    images: dict[Kind, Path] = {}
    others: list[Path] = []
    release: str | None = None
    for path in sorted(folder.iterdir()):
        if path.name.startswith(_IMAGE_NAMES) and layouts.is_file(path):
            kind, found_release = kind_of(path)
            if kind in images:
                if kind != "vmlinux" or not _are_halves(images[kind], path):
                    raise KernelNotFoundError(
                        f"{folder}: holds several kernels ({images[kind].name}, {path.name}); "
                        "name one of them."
                    )
                others.append(path)  # one has the code, the other the debug information
                continue
            images[kind] = path
            release = release or found_release
    if modules is None:
        found, modules_dir = modulefiles.find_modules(folder), folder
    else:
        found, modules_dir = _given_modules(modules, release)
    if not images and not found:
        raise KernelNotFoundError(
            f"{folder}: holds no vmlinux, vmlinuz or modules; give the folder of a kernel."
        )
    if release is None and found:
        release = kind_of(found[0].path)[1]
    return Draft(
        release,
        images.get("vmlinux"),
        images.get("vmlinuz"),
        found,
        modules_dir,
        [],
        tuple(others),
        (folder,),
    )


def _some(releases: Sequence[str]) -> str:
    more = f" and {len(releases) - _NAMED} more" if len(releases) > _NAMED else ""
    return ", ".join(releases[:_NAMED]) + more


def _root_of(mark: Path) -> tuple[Path, str] | None:
    return layouts.split(mark.parent)


def _from_file(path: Path, modules: Path | None) -> Draft | KernelFiles:
    kind, release = kind_of(path)
    if kind == "module":
        return _from_module(path, release)
    vmlinux = path if kind == "vmlinux" else None
    vmlinuz = path if kind == "vmlinuz" else None
    parent = path.absolute().parent
    if vmlinux and any(layouts.is_file(parent / mark) for mark in _BUILD_MARKS):
        return _from_build_tree(parent, modules)
    installed = layouts.split(path)
    if installed is not None:
        return _assemble([installed[0]], installed[1], modules, vmlinux, vmlinuz)
    if modules is None and release is not None and release in layouts.releases([parent]):
        # NixOS: bzImage or vmlinux without a release in its name, lib/modules/RELEASE beside it.
        return _assemble([parent], release, modules, vmlinux, vmlinuz)
    if modules is None:
        return Draft(release, vmlinux, vmlinuz, (), None, [], roots=(parent,))
    found, folder = _given_modules(modules, release)
    return Draft(release, vmlinux, vmlinuz, found, folder, [], roots=(parent,))


def _from_module(path: Path, release: str | None) -> KernelFiles:
    name = modulefiles.module_name(path)
    for parent in path.absolute().parents:
        installed = layouts.split(parent)
        if installed is not None:
            whole = _finish(complete(_assemble([installed[0]], installed[1], None), None))
            only = tuple(m for m in whole.modules if m.path.samefile(path))
            if only:
                return KernelFiles(whole.release, None, None, only, whole.modules_dir, whole.config)
    debug = path if modulefiles.has_dwarf(path) else None
    missing = [] if debug else [_no_module_debug(1, 1, release)]
    module = ModuleFile(name, path, debug, f"{name}.ko")
    return KernelFiles(release, None, None, (module,), missing=tuple(missing))


def _assemble(
    roots: Sequence[Path],
    release: str,
    modules: Path | None,
    vmlinux: Path | None = None,
    vmlinuz: Path | None = None,
) -> Draft:
    """Collect the parts of `release` below `roots`; given images take precedence."""
    images = layouts.find_files(roots, layouts.VMLINUX, release)
    images += _unnamed(roots, "vmlinux", release)
    if vmlinux is None and images:
        vmlinux = next((path for path in images if modulefiles.has_dwarf(path)), images[0])
    boot_images = layouts.find_files(roots, layouts.VMLINUZ, release)
    boot_images += _unnamed(roots, "bzImage", release)
    vmlinuz = vmlinuz or (boot_images[0] if boot_images else None)
    debug_folders = layouts.find_folders(roots, layouts.DEBUG_MODULES, release)
    folders = layouts.find_folders(roots, layouts.MODULES, release)
    found: tuple[ModuleFile, ...] = ()
    folder: Path | None = None
    if modules is not None:
        found, folder = _given_modules(modules, release)
    else:
        # An image package has modules; a debug package alone has whole ones in its own folder.
        for folder in [*folders, *debug_folders]:
            found = modulefiles.find_modules(folder)
            if found:
                break
    for debug in debug_folders:
        if any(module.debug is None for module in found):
            found = modulefiles.with_debug(found, debug)
    configs = layouts.find_files(roots, layouts.CONFIG, release)
    others = tuple(path for path in images if path != vmlinux)
    return Draft(release, vmlinux, vmlinuz, found, folder, configs, others, tuple(roots))


def _unnamed(roots: Sequence[Path], name: str, release: str) -> list[Path]:
    """List images at the top of a root that has no more than one kernel, as NixOS's store has."""
    places = [root / name for root in roots if layouts.is_file(root / name)]
    return [place for place in places if kind_of(place)[1] in {None, release}]


def _are_halves(one: Path, other: Path) -> bool:
    """Whether two images are the code and the debug information of one kernel."""
    if modulefiles.has_dwarf(one) == modulefiles.has_dwarf(other):
        return False
    with ElfFile.open(one) as first, ElfFile.open(other) as second:
        return first.build_id is not None and first.build_id == second.build_id


def _given_modules(folder: Path, release: str | None) -> tuple[tuple[ModuleFile, ...], Path]:
    """Resolve --modules: lib/modules/RELEASE, the root above it, or any folder with modules."""
    if not layouts.is_folder(folder):
        raise KernelNotFoundError(f"{folder}: no such folder of modules.")
    below = layouts.releases([folder])
    wanted = release if release in below else (below[0] if len(below) == 1 else None)
    if wanted is not None:
        places = layouts.find_folders([folder], layouts.MODULES, wanted)
        folder = places[0] if places else folder
    found = modulefiles.find_modules(folder)
    if not found:
        raise KernelNotFoundError(f"{folder}: holds no modules (.ko, .ko.xz, .ko.zst, .ko.gz).")
    return found, folder


def _finish(draft: Draft) -> KernelFiles:
    """Say what is missing of what was found."""
    release, vmlinux, vmlinuz = draft.release, draft.vmlinux, draft.vmlinuz
    modules, modules_dir = draft.modules, draft.modules_dir
    missing = list(draft.problems)
    debug, image = distributions.debug_advice(release), distributions.image_advice(release)
    called = release or "this kernel"
    if vmlinux is None:
        missing.append(f"No vmlinux of {called}, so no debug information: {debug}.")
    elif not modulefiles.has_dwarf(vmlinux):
        missing.append(f"{vmlinux} has no debug information: {debug}.")
    if vmlinuz is None:
        missing.append(f"No boot image of {called}, so it cannot be booted: {image}.")
    if vmlinux is not None and vmlinuz is not None and not _same_build(vmlinux, vmlinuz):
        missing.append(
            f"{vmlinuz} is not of the same build as {vmlinux}, so it is not used: {image}."
        )
        vmlinuz = None
    modules = _drop_foreign_debug(modules, missing)
    config = _config(draft.configs, vmlinux, vmlinuz)
    if not modules and (not config or "CONFIG_MODULES" in config):
        missing.append(f"No modules of {called}: {image}, or name their folder.")
    stripped = sum(module.debug is None for module in modules)
    if stripped:
        missing.append(_no_module_debug(stripped, len(modules), release))
    if not config:
        missing.append(f"No configuration of {called}: {image}.")
    files = KernelFiles(release, vmlinux, vmlinuz, modules, modules_dir, config, tuple(missing))
    if modules and files.builtin_modinfo is None:
        missing.append(f"No modules.builtin.modinfo of {called}: {image}.")
    return KernelFiles(release, vmlinux, vmlinuz, modules, modules_dir, config, tuple(missing))


def _same_build(vmlinux: Path, vmlinuz: Path) -> bool:
    """Compare build number and time, which both images tell; True where one does not."""
    with mapped(vmlinuz) as data:
        if not bzimage.is_boot_image(data):
            return True
        version = bzimage.read_setup_header(data, name=str(vmlinuz)).version or ""
    with ElfFile.open(vmlinux) as elf:
        banner = _first_match(_BUILD, elf, ".rodata")
    build = version.partition("#")[2].strip()
    return not build or banner is None or banner.strip() == build


def _drop_foreign_debug(
    modules: tuple[ModuleFile, ...], missing: list[str]
) -> tuple[ModuleFile, ...]:
    """Refuse debug files of another build: one module tells, as packages are built as a whole."""
    first = next((m for m in modules if m.debug not in {None, m.path}), None)
    if first is None or first.debug_matches():
        return modules
    missing.append(
        f"{first.debug} is not of the same build as {first.path}: the debug files of the modules "
        "are not used."
    )
    return tuple(
        m if m.debug == m.path else ModuleFile(m.name, m.path, None, m.location) for m in modules
    )


def _no_module_debug(stripped: int, total: int, release: str | None) -> str:
    advice = distributions.debug_advice(release)
    return f"{stripped} of {total} modules have no debug information: {advice}."


def _config(configs: Sequence[Path], vmlinux: Path | None, vmlinuz: Path | None) -> dict[str, str]:
    for path in configs:
        return kconfig.read_config_file(_read(path), str(path))
    if vmlinux is not None:
        with ElfFile.open(vmlinux) as kernel:
            return kconfig.embedded_config(kernel)
    if vmlinuz is not None:
        with bzimage.open_vmlinuz(vmlinuz) as kernel:
            return kconfig.embedded_config(kernel)
    return {}


def _read(path: Path) -> bytes:
    return read(path, limit=_MAX_TEXT, what="a text of a kernel's", error=KernelNotFoundError)
