"""The configuration a kernel was built with, from its .config or from the kernel itself.

Sources: Documentation/kbuild/kconfig.rst for the text, kernel/configs.c for CONFIG_IKCONFIG.
"""

import re
from typing import TYPE_CHECKING, Final

from trapline.base.errors import BadImageError
from trapline.kernel.elf import compression

if TYPE_CHECKING:
    from trapline.kernel.elf.file import ElfFile

_OPTION: Final = re.compile(r"^(CONFIG_\w+)=(.*)$", re.MULTILINE)
# Debian's full configuration is 280 KB.
_MAX_SIZE: Final = 8 << 20
_START: Final = b"IKCFG_ST"


def parse_config(text: str) -> dict[str, str]:
    """Map each option that is set to "y", "m", a number, or a string without its quotes."""
    return {
        name: value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
        for name, value in _OPTION.findall(text[:_MAX_SIZE])
    }


def embedded_config(kernel: "ElfFile") -> dict[str, str]:
    """Read the configuration that CONFIG_IKCONFIG puts into .rodata; empty where it did not.

    Raises BadImageError where the mark is there and the data after it is corrupt.
    """
    rodata = bytes(kernel.contents(".rodata"))
    start = rodata.find(_START)
    # The strings of the kernel's own tools may hold the mark; gzip data must follow it.
    while start >= 0:
        data = memoryview(rodata)[start + len(_START) :]
        if compression.detect(data) == "gzip":
            text = compression.decompress(data, limit=_MAX_SIZE, name=f"{kernel.name}: config")
            return parse_config(text.decode("utf-8", "replace"))
        start = rodata.find(_START, start + 1)
    return {}


def read_config_file(data: bytes, name: str) -> dict[str, str]:
    """Parse a config file as installed beside a kernel, compressed (/proc/config.gz) or not."""
    if compression.detect(data) is not None:
        data = compression.decompress(data, limit=_MAX_SIZE, name=name)
    options = parse_config(data.decode("utf-8", "replace"))
    if data.strip() and not options:
        raise BadImageError(f"{name}: is not a kernel configuration; remove it or put one there.")
    return options
