"""An ACPI table that the user gives, as `iasl` and /sys/firmware/acpi/tables write them."""

import re
import struct
from pathlib import Path
from typing import Final

from trapline.base.errors import BadMachineError
from trapline.base.files import read
from trapline.machine.loader.acpi import HEADER

# The region of all tables is 64 KiB.
MAX_TABLE: Final = 1 << 16
_SIGNATURE: Final = re.compile(rb"[A-Z0-9_]{4}")
# They hold addresses of others, which only the loader knows.
_OURS: Final = frozenset({b"FACP", b"FACS", b"XSDT", b"RSDT"})


def read_table(path: Path) -> bytes:
    """Read one table; raises BadMachineError for what is none, or cannot be taken from outside.

    Its checksum is not looked at: what becomes of a wrong one is the guest's to decide.
    """
    data = read(path, limit=MAX_TABLE, what="an ACPI table", error=BadMachineError)
    signature = data[:4]
    if len(data) < HEADER.size or not _SIGNATURE.fullmatch(signature):
        raise BadMachineError(f"{path}: is no ACPI table; give what iasl compiled (.aml).")
    (size,) = struct.unpack_from("<I", data, 4)
    if size != len(data):
        raise BadMachineError(
            f"{path}: its header says {size:,} bytes, the file has {len(data):,}; give one table."
        )
    if signature in _OURS:
        raise BadMachineError(
            f"{path}: {signature.decode()} is made here, as it points at the others; give another."
        )
    return data
