"""The files that make up one kernel: image, debug information, modules, configuration.

`trapline.kernel.find.locate` finds them; what is not there is recorded in `KernelFiles.missing`, as
a kernel without debug information can still be examined in part.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trapline.kernel.elf.file import MAX_MODULE, ElfFile


@dataclass(frozen=True, slots=True)
class ModuleFile:
    """One loadable module.

    `name` is as `lsmod` prints it (underscores, no suffix). `path` is the file that is loaded
    (.ko, .ko.xz, .ko.zst, .ko.gz), `debug` the file with its DWARF: the same path where the
    module was not stripped, None where there is none. `location` is the module's place below
    lib/modules/RELEASE without compression suffix, as in modules.builtin:
    "kernel/drivers/net/virtio_net.ko".
    """

    name: str
    path: Path
    debug: Path | None
    location: str

    def debug_matches(self) -> bool:
        """Whether `debug` is of the same build as `path`, by GNU build id.

        Files without a build id match nothing but themselves. Raises BadImageError for unsound
        files.
        """
        if self.debug is None or self.debug == self.path:
            return self.debug is not None
        with (
            ElfFile.open(self.path, limit=MAX_MODULE) as module,
            ElfFile.open(self.debug, limit=MAX_MODULE) as debug,
        ):
            return module.build_id is not None and module.build_id == debug.build_id


@dataclass(frozen=True, slots=True)
class KernelFiles:
    """What was found of one kernel; every path exists.

    `release` is what `uname -r` prints. `vmlinux` is the ELF image, with DWARF where there is
    any; `vmlinuz` the boot image. `modules` is sorted by location. `modules_dir` is
    lib/modules/RELEASE. `config` maps CONFIG_X to "y", "m", or a value without quotes; options
    that are not set are absent. `missing` holds one sentence for each part that was not found:
    what it is, and where it can be had.
    """

    release: str | None
    vmlinux: Path | None
    vmlinuz: Path | None
    modules: tuple[ModuleFile, ...] = ()
    modules_dir: Path | None = None
    config: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def builtin_list(self) -> Path | None:
        """modules.builtin: the location of each module that is built into vmlinux."""
        return self._listing("modules.builtin")

    @property
    def builtin_modinfo(self) -> Path | None:
        """modules.builtin.modinfo: NUL-separated "name.key=value" of the built-in modules."""
        return self._listing("modules.builtin.modinfo")

    def _listing(self, name: str) -> Path | None:
        if self.modules_dir is None:
            return None
        path = self.modules_dir / name
        return path if path.is_file() else None
