"""Virtio device ids, and how a PCI function states its own.

Sources: Virtual I/O Device specification 1.2, section 5 "Device Types" and 4.1.2 "PCI Device
Discovery"; Linux drivers/virtio/virtio_pci_modern_dev.c and virtio_pci_legacy_dev.c.
"""

from typing import Final

PCI_VENDOR: Final = 0x1AF4
#: PCI device ids of transitional devices, which speak the legacy interface too.
TRANSITIONAL: Final = range(0x1000, 0x1040)
#: PCI device ids of non-transitional ("modern") devices: 0x1040 + the virtio device id.
MODERN: Final = range(0x1040, 0x1080)

# Transitional PCI device id -> virtio device id (4.1.2.1, table "Transitional PCI Device ID").
_TRANSITIONAL_TYPES: Final = {
    0x1000: 1,
    0x1001: 2,
    0x1002: 5,
    0x1003: 3,
    0x1004: 8,
    0x1005: 4,
    0x1009: 9,
}

DEVICE_TYPES: Final = {
    1: "network card",
    2: "block device",
    3: "console",
    4: "entropy source",
    5: "memory ballooning (traditional)",
    6: "ioMemory",
    7: "rpmsg",
    8: "SCSI host",
    9: "9P transport",
    10: "mac80211 wlan",
    11: "rproc serial",
    12: "virtio CAIF",
    13: "memory balloon",
    16: "GPU device",
    17: "timer/clock device",
    18: "input device",
    19: "socket device",
    20: "crypto device",
    21: "signal distribution module",
    22: "pstore device",
    23: "IOMMU device",
    24: "memory device",
    25: "sound device",
    26: "file system device",
    27: "PMEM device",
    28: "RPMB device",
    29: "mac80211 hwsim wireless simulation device",
    30: "video encoder device",
    31: "video decoder device",
    32: "SCMI device",
    33: "NitroSecureModule",
    34: "I2C adapter",
    35: "watchdog",
    36: "CAN device",
    38: "parameter server",
    39: "audio policy device",
    40: "Bluetooth device",
    41: "GPIO device",
    42: "RDMA device",
}


def device_type(pci_device: int) -> int | None:
    """Return the virtio device id that PCI device id `pci_device` of vendor 1af4 stands for.

    None where the id is no virtio device's. For a transitional device this is what the
    specification assigns; the drivers do not check it, see `takes_subsystem_id`.
    """
    if pci_device in MODERN:
        return pci_device - MODERN.start
    return _TRANSITIONAL_TYPES.get(pci_device)


def takes_subsystem_id(pci_device: int) -> bool:
    """Whether Linux takes the virtio device id from the PCI *subsystem* device id.

    It does so for every transitional id, in `vp_modern_probe()` and `vp_legacy_probe()`: the
    host chooses the subsystem id, so one allowed transitional id admits each virtio driver.
    """
    return pci_device in TRANSITIONAL
