"""What enforces an allow list on a stock kernel: files for the guest, arguments for its host.

    usr/lib/trapline/device-filter                    the list, as a shell script that acts on it
    etc/initramfs-tools/hooks/trapline                copies it into the initramfs
    etc/initramfs-tools/scripts/init-top/trapline     runs it before udev
    etc/udev/rules.d/50-trapline.rules                keeps unlisted devices unbound when they come
    etc/modprobe.d/trapline.conf                      keeps drivers of unlisted devices from loading
    kernel-command-line, qemu-arguments               one line each

The script first turns off automatic probing, then unbinds what is not listed, then loads the
drivers of what is, and binds it. Bridges are no exception: what calls itself a bridge is the
host's choice. What the script cannot do is said in it: a driver that is built in has probed
before any of this runs. Of a PCI device that is plugged in later the same holds for every driver
that is loaded by then: pci_bus_add_device() (drivers/pci/bus.c) attaches it without a look at
drivers_autoprobe. Its bind event then has the rules unbind it.
"""

import re
from typing import TYPE_CHECKING, Final

from trapline.base.errors import OutputError
from trapline.base.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from trapline.allowlist.entries import AllowList
    from trapline.results.filter import FilterResult

SCRIPT: Final = "usr/lib/trapline/device-filter"
_EXECUTABLE: Final = frozenset(
    (
        SCRIPT,
        "etc/initramfs-tools/hooks/trapline",
        "etc/initramfs-tools/scripts/init-top/trapline",
    )
)
_BUSES: Final = ("pci", "virtio")
_MODULE: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_INITCALL: Final = re.compile(r"__initcall__kmod_(\w+?)__\d+_\d+_(\w+?)(?:\ds?|early|rootfs)")
_PROMISE: Final = "disable-legacy=on,iommu_platform=on"
_QEMU_DEVICES: Final = {
    "1af4:1041": f"virtio-net-pci,netdev=NETDEV,{_PROMISE}",
    "1af4:1042": f"virtio-blk-pci,drive=DRIVE,{_PROMISE}",
    "1af4:1043": f"virtio-serial-pci,{_PROMISE}",
    "1af4:1049": f"virtio-9p-pci,fsdev=FSDEV,mount_tag=TAG,{_PROMISE}",
    "8086:100e": "e1000,netdev=NETDEV",
    "10ec:8139": "rtl8139,netdev=NETDEV",
}

_FILTER: Final = """\
#!/bin/sh
# Device filter of a confidential guest, from the allow list "{title}".
# Written by trapline filter export.
#
#   device-filter lock              no automatic probing; unlisted devices unbound, the drivers of
#                                   listed ones loaded and bound
#   device-filter probe DEVICE BUS  do so for one device (a path below /sys/devices)
#   device-filter list              say of each device whether it is listed and what is bound
#
# A driver that is built into the kernel has probed its devices before this runs:
# `trapline filter check KERNEL` names those drivers. A PCI device that is plugged in later is
# probed by the drivers that are loaded by then, and unbound when udev hears of it.
SYS=${{SYS:-/sys}}

listed() {{
  case "$1" in
{cases}
    *) return 1 ;;
  esac
}}

each() {{
  for bus in {buses}; do
    for device in "$SYS/bus/$bus/devices/"*; do
      [ -e "$device/modalias" ] || continue
      read -r modalias < "$device/modalias"
      "$1"
    done
  done
}}

unbind_unlisted() {{
  if [ -e "$device/driver" ] && ! listed "$modalias"; then
    echo "${{device##*/}}" > "$device/driver/unbind"
  fi
}}

bind_listed() {{
  if [ ! -e "$device/driver" ] && listed "$modalias"; then
    # A driver that is loaded later binds nothing: there is no automatic probing.
    modprobe -q -b "$modalias" 2> /dev/null
    echo "${{device##*/}}" > "$SYS/bus/$bus/drivers_probe"
  fi
}}

show() {{
  verdict=unlisted
  listed "$modalias" && verdict=listed
  driver=unbound
  [ -e "$device/driver" ] && driver=bound
  echo "$bus ${{device##*/}} $verdict $driver"
}}

case "$1" in
  lock)
    for bus in {buses}; do
      [ -e "$SYS/bus/$bus/drivers_autoprobe" ] && echo 0 > "$SYS/bus/$bus/drivers_autoprobe"
    done
    each unbind_unlisted
    # Twice: binding a transport makes devices on the bus above it.
    each bind_listed
    each bind_listed
    ;;
  probe)
    device=$2
    bus=$3
    # It may be gone by now.
    [ -e "$device/modalias" ] && read -r modalias < "$device/modalias" || exit 0
    unbind_unlisted
    bind_listed
    ;;
  list) each show ;;
  *)
    echo "usage: device-filter lock|probe DEVICE BUS|list" >&2
    exit 2
    ;;
esac
"""

_HOOK: Final = """\
#!/bin/sh
# Copies the device filter into the initramfs. Written by trapline filter export.
[ "$1" = prereqs ] && exit 0
. /usr/share/initramfs-tools/hook-functions
copy_file script /usr/lib/trapline/device-filter
"""

_INIT_TOP: Final = """\
#!/bin/sh
# Locks the buses before udev starts. Written by trapline filter export.
[ "$1" = prereqs ] && exit 0
exec /usr/lib/trapline/device-filter lock
"""


def files(
    allow: "AllowList",
    checked: "FilterResult | None" = None,
    blocked: "Sequence[str]" = (),
) -> "dict[str, str]":
    """Return the files by path.

    `checked` is the list held against a kernel, whose drivers modprobe is then told of.
    `blocked` are initcalls of built-in drivers that must not run.
    """
    return {
        SCRIPT: _script(allow),
        "etc/initramfs-tools/hooks/trapline": _HOOK,
        "etc/initramfs-tools/scripts/init-top/trapline": _INIT_TOP,
        "etc/udev/rules.d/50-trapline.rules": _udev(allow),
        "etc/modprobe.d/trapline.conf": _modprobe(allow, checked),
        "kernel-command-line": _command_line(blocked),
        "qemu-arguments": _qemu(allow),
    }


def write(contents: "Mapping[str, str]", folder: "Path") -> None:
    """Write the files below a folder that is empty or does not exist; raises OutputError."""
    try:
        if folder.exists() and any(folder.iterdir()):
            raise OutputError(f"{folder}: is not empty; name a new folder.")
        for name, text in contents.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, [text.encode()])
            path.chmod(0o755 if name in _EXECUTABLE else 0o644)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}.") from None


def _script(allow: "AllowList") -> str:
    buses = _BUSES if allow.filters_virtio_bus else _BUSES[:1]
    # Patterns hold letters, digits, colons and stars only: nothing to quote.
    cases = [
        f"    {entry.pattern.pattern()}) ;; # {entry.id} {_comment(entry.name)}"
        for entry in allow.entries
    ]
    return _FILTER.format(
        title=_comment(allow.title), cases="\n".join(cases), buses=" ".join(buses)
    )


def _comment(text: str) -> str:
    """Keep a name from a list file from ending its comment or its line."""
    return "".join(c if c.isprintable() and c not in "\\{}" else "?" for c in text)


def _udev(allow: "AllowList") -> str:
    buses = _BUSES if allow.filters_virtio_bus else _BUSES[:1]
    lines = [
        f'# Allow list "{_comment(allow.title)}". Written by trapline filter export.',
        "# An unlisted device loses its MODALIAS, so that no rule behind this loads its driver,",
        "# and is unbound where a driver has it: a PCI device that is plugged in is probed by all",
        "# that are loaded, with automatic probing off as well.",
        "# A listed one gets its driver loaded and bound here: with automatic probing off, one",
        "# that 80-drivers.rules loads later would bind nothing.",
        'ACTION=="remove", GOTO="trapline_end"',
        f'SUBSYSTEM!="{"|".join(buses)}", GOTO="trapline_end"',
    ]
    lines += [
        f'ENV{{MODALIAS}}=="{entry.pattern.pattern()}", GOTO="trapline_listed"'
        for entry in allow.entries
    ]
    run = f'RUN+="/{SCRIPT} probe %S%p $env{{SUBSYSTEM}}"'
    lines += [
        'ENV{MODALIAS}=""',
        # Sent before drivers are tried, and once one has it.
        f'ACTION=="add|bind", {run}',
        'GOTO="trapline_end"',
        'LABEL="trapline_listed"',
        f'ACTION=="add", {run}',
        'LABEL="trapline_end"',
    ]
    return "\n".join(lines) + "\n"


def _modprobe(allow: "AllowList", checked: "FilterResult | None") -> str:
    head = [
        f'# Allow list "{_comment(allow.title)}". Written by trapline filter export.',
        "# A blacklisted module is not loaded for a device; insmod and modprobe by name still do.",
    ]
    if checked is None:
        return "\n".join([*head, "# Name a kernel to have its modules listed here."]) + "\n"
    head.append(
        f"# {_comment(checked.kernel.release or 'kernel')}: drivers no listed device needs."
    )
    return "\n".join([*head, *(f"blacklist {name}" for name in outside(checked))]) + "\n"


def outside(checked: "FilterResult") -> tuple[str, ...]:
    """Name the loadable PCI and virtio drivers that the list does not let in."""
    needed = {n for d in checked.drivers if d.verdict == "allowed" for n in d.reaches}
    return tuple(
        driver.name
        for driver in checked.drivers
        if not driver.builtin
        and driver.bus in _BUSES
        and driver.verdict != "allowed"
        and driver.name not in needed
        and _MODULE.fullmatch(driver.name)
    )


def early(checked: "FilterResult") -> tuple[str, ...]:
    """Name the built-in PCI and virtio drivers that the list keeps out and that touch the host.

    Others, such as ACPI or the serial console, a kernel may need to start at all; `filter check`
    names them.
    """
    found = set(checked.findings)
    return tuple(d.name for d in checked.drivers if d.name in found and d.bus in _BUSES)


def initcalls(symbols: "Iterable[str]", modules: "Iterable[str]") -> tuple[str, ...]:
    """Name the initcalls of built-in modules, for `initcall_blacklist=`.

    Symbols are those of vmlinux: `__initcall__kmod_MODULE__COUNTER_LINE_FUNCTION6`
    (___initcall_id() in include/linux/init.h).
    """
    wanted = {name.replace("-", "_") for name in modules}
    found = (_INITCALL.fullmatch(symbol) for symbol in symbols)
    return tuple(sorted({m[2] for m in found if m is not None and m[1] in wanted}))


def _command_line(blocked: "Sequence[str]") -> str:
    words = ["hpet=disable"]
    if blocked:
        words.append("initcall_blacklist=" + ",".join(blocked))
    return " ".join(words) + "\n"


def _qemu(allow: "AllowList") -> str:
    """Give an example of each device on the list; a modern one promises to keep to the DMA API."""
    words = ["-nodefaults", "-machine", "q35,hpet=off,i8042=off,usb=off"]
    for entry in allow.entries:
        device = _QEMU_DEVICES.get(entry.id)
        if device is not None:
            words += ["-device", device]
    return " ".join(words) + "\n"
