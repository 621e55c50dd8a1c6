"""The devices `--device` knows, and what QEMU is told for each.

    NAME[,OPTION=VALUE]…      blk,file=disk.img   net-legacy   9p,share=/srv,tag=host
    qemu:STRING               a raw QEMU -device argument

A comma in a value is written twice, as QEMU has it: net,netdev=user,,hostfwd=tcp::8080-:80

PCI ids: virtio 1.2, 4.1.2.1 (0x1040 + device id for modern ones, the transitional ids before);
the names `-legacy` force the transitional device without its modern interface.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trapline.base.errors import BadMachineError, UsageError

# A TD's drivers refuse virtio devices that do not promise to keep to the DMA API
# (VIRTIO_F_ACCESS_PLATFORM); legacy ones cannot promise it.
_MODERN: Final = "disable-legacy=on,iommu_platform=on"
_LEGACY: Final = "disable-modern=on,disable-legacy=off"


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """One `--device`, parsed: the model's name and its options."""

    name: str
    options: dict[str, str]

    def __str__(self) -> str:
        """Return it as `--device` takes it, whatever the order of the options was."""
        return ",".join([self.name, *(f"{k}={v}" for k, v in sorted(self.options.items()))])

    def take(self, key: str, default: str | None = None) -> str:
        """Give an option's value; UsageError when it is missing and has no default."""
        value = self.options.get(key, default)
        if value is None:
            raise UsageError(
                f"--device {self.name} needs {key}=…, for example {_example(self.name)}."
            )
        return value


Build = Callable[[DeviceRequest, int], list[str]]


@dataclass(frozen=True, slots=True)
class Model:
    """A device model: its PCI id, a title, its options, and QEMU's arguments for it."""

    pci_id: str
    title: str
    options: tuple[str, ...]
    build: Build
    needs_io_apic: bool = False  # it has neither MSI nor MSI-X


def _escape(value: str) -> str:
    """Double the commas, as QEMU's option parser wants them."""
    return value.replace(",", ",,")


def _blk(device: str) -> Build:
    def build(request: DeviceRequest, number: int) -> list[str]:
        path = Path(request.take("file"))
        writable = request.take("write", "off") == "on"
        if not path.is_file():
            raise BadMachineError(f"{path}: no such image file for --device {request.name}.")
        try:
            path.open("r+b" if writable else "rb").close()
        except OSError as error:
            mode = "written (write=on)" if writable else "read"
            raise BadMachineError(f"{path}: cannot be {mode}: {error.strerror}.") from error
        # Readers share an image; a writer has it alone.
        drive = (
            f"driver=raw,node-name=disk{number},read-only={'off' if writable else 'on'},"
            f"file.driver=file,file.locking={'auto' if writable else 'off'},"
            f"file.filename={_escape(str(path.resolve()))}"
        )
        return ["-blockdev", drive, "-device", f"{device},drive=disk{number}"]

    return build


def _net(device: str) -> Build:
    def build(request: DeviceRequest, number: int) -> list[str]:
        backend = request.take("netdev", "user")
        return [
            *("-netdev", f"{backend},id=net{number}"),
            *("-device", f"{device},netdev=net{number},romfile=,mac=52:54:00:12:34:{number:02x}"),
        ]

    return build


def _console(device: str) -> Build:
    def build(request: DeviceRequest, number: int) -> list[str]:
        backend = request.take("chardev", "null")
        if path := request.options.get("file"):
            backend = f"file,path={_escape(path)}"
        elif path := request.options.get("socket"):
            # QEMU connects; who listens there is at the other end of the line.
            backend = f"socket,path={_escape(path)}"
        return [
            *("-chardev", f"{backend},id=char{number}"),
            *("-device", f"{device},id=serial{number}"),
            *("-device", f"virtconsole,chardev=char{number},bus=serial{number}.0"),
        ]

    return build


def _9p(device: str) -> Build:
    def build(request: DeviceRequest, number: int) -> list[str]:
        share = Path(request.take("share"))
        if not share.is_dir():
            raise BadMachineError(f"{share}: no such folder to share by --device {request.name}.")
        mode = "" if request.take("write", "off") == "on" else ",readonly=on"
        folder = _escape(str(share.resolve()))
        return [
            "-fsdev",
            f"local,id=fs{number},path={folder},security_model=none{mode}",
            "-device",
            f"{device},fsdev=fs{number},mount_tag={_escape(request.take('tag', 'share'))}",
        ]

    return build


_BLK: Final = ("file", "write")
_LINE: Final = ("file", "socket", "chardev")
_SHARE: Final = ("share", "tag", "write")

CATALOGUE: Final[dict[str, Model]] = {
    "blk": Model("1af4:1042", "Virtio 1.0 block", _BLK, _blk(f"virtio-blk-pci,{_MODERN}")),
    "blk-legacy": Model("1af4:1001", "Virtio block", _BLK, _blk(f"virtio-blk-pci,{_LEGACY}")),
    "net": Model("1af4:1041", "Virtio 1.0 network", ("netdev",), _net(f"virtio-net-pci,{_MODERN}")),
    "net-legacy": Model(
        "1af4:1000", "Virtio network", ("netdev",), _net(f"virtio-net-pci,{_LEGACY}")
    ),
    "console": Model(
        "1af4:1043", "Virtio 1.0 console", _LINE, _console(f"virtio-serial-pci,{_MODERN}")
    ),
    "console-legacy": Model(
        "1af4:1003", "Virtio console", _LINE, _console(f"virtio-serial-pci,{_LEGACY}")
    ),
    "9p": Model("1af4:1049", "Virtio 1.0 9P", _SHARE, _9p(f"virtio-9p-pci,{_MODERN}")),
    "9p-legacy": Model("1af4:1009", "Virtio 9P", _SHARE, _9p(f"virtio-9p-pci,{_LEGACY}")),
    "e1000": Model("8086:100e", "Intel 82540EM (e1000)", ("netdev",), _net("e1000"), True),
    "rtl8139": Model("10ec:8139", "Realtek RTL8139", ("netdev",), _net("rtl8139"), True),
}

RAW_PREFIX: Final = "qemu:"


def _example(name: str) -> str:
    return f"{name},share=/srv" if name.startswith("9p") else f"{name},file=disk.img"


def parse(text: str) -> DeviceRequest:
    """Read one `--device` argument; UsageError for an unknown name or option."""
    if text.startswith(RAW_PREFIX):
        return DeviceRequest(RAW_PREFIX, {"device": text.removeprefix(RAW_PREFIX)})
    name, *parts = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    if name not in CATALOGUE:
        raise UsageError(
            f"no device is called {name!r}: name ioapic, hpet, mmio-uart or one of "
            f"{', '.join(CATALOGUE)}, or give QEMU's own words as {RAW_PREFIX}STRING."
        )
    options = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in CATALOGUE[name].options or key in options:
            known = ", ".join(f"{option}=…" for option in CATALOGUE[name].options)
            raise UsageError(
                f"--device {name} does not take {part!r}; it takes {known} "
                "(write a comma in a value twice)."
            )
        if not value or (key == "write" and value not in {"on", "off"}):
            wanted = "on or off" if key == "write" else "a value"
            raise UsageError(f"--device {name}: {key}= needs {wanted}, not {value!r}.")
        options[key] = value
    if CATALOGUE[name].options is _LINE and len(options) > 1:
        raise UsageError(f"--device {name} takes one of {', '.join(options)}, not all of them.")
    return DeviceRequest(name, options)


def arguments(requests: Sequence[DeviceRequest]) -> list[str]:
    """Give QEMU's arguments for all devices, in order."""
    words: list[str] = []
    for number, request in enumerate(requests):
        if request.name == RAW_PREFIX:
            words += ["-device", request.options["device"]]
        else:
            words += CATALOGUE[request.name].build(request, number)
    return words


def needs_io_apic(requests: Sequence[DeviceRequest]) -> bool:
    """Say whether a device can only interrupt through an IO-APIC."""
    return any(r.name != RAW_PREFIX and CATALOGUE[r.name].needs_io_apic for r in requests)
