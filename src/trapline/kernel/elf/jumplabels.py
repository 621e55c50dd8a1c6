"""The __jump_table: branches that static keys turn on and off.

Source: struct jump_entry, include/linux/jump_label.h, with offsets from each field's own address
(CONFIG_HAVE_ARCH_JUMP_LABEL_RELATIVE, x86-64 since 9fc0f798ab7c, v4.19): 32-bit `code`, 32-bit
`target`, 64-bit `key`.
"""

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

_ENTRY: Final = np.dtype([("code", "<i4"), ("target", "<i4"), ("key", "<i8")])


def parse(data: memoryview, address: int) -> "Mapping[int, int]":
    """Map each branch to where it goes when its key is on that side; empty for another layout.

    `address` is the table's. The instruction at the branch is a NOP or a jump there.
    """
    if len(data) % _ENTRY.itemsize:
        return {}
    records = np.frombuffer(data, _ENTRY)
    here = np.uint64(address) + np.arange(len(records), dtype=np.uint64) * np.uint64(
        _ENTRY.itemsize
    )
    code = here + records["code"].astype(np.int64).view(np.uint64)
    target = here + np.uint64(4) + records["target"].astype(np.int64).view(np.uint64)
    return dict(zip(code.tolist(), target.tolist(), strict=True))
