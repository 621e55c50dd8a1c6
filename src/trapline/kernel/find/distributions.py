"""Which package of a distribution holds a missing part of a kernel, told by its release name."""

import re
from typing import Final

# Debian: 6.12.117+deb12-cloud-amd64, 6.1.0-56-amd64; Ubuntu: 6.8.0-31-generic, 6.8.0-1008-aws;
# Fedora and RHEL: 6.9.4-200.fc40.x86_64; Arch: 6.9.3-arch1-1; openSUSE: 6.4.0-150600.21-default.
_DEBIAN: Final = re.compile(r"\+deb\d+|-(cloud-|rt-)?amd64$")
_UBUNTU: Final = re.compile(r"-\d+-(generic|lowlatency|aws|azure|gcp|gke|intel|kvm|oem|oracle)$")
_FEDORA: Final = re.compile(r"\.(fc|el)\d+.*\.x86_64$")
_ARCH: Final = re.compile(r"-(arch|zen|lts|hardened)\d*-\d+$")
_SUSE: Final = re.compile(r"-default$")


def debug_advice(release: str | None) -> str:
    """Say in an imperative clause how to get the debug information of a kernel."""
    if release is None:
        return "install the debug package of this kernel or name its vmlinux"
    if _DEBIAN.search(release):
        return f"run apt install linux-image-{release}-dbg, or name it deb:linux-image-{release}"
    if _UBUNTU.search(release):
        return (
            f"run apt install linux-image-unsigned-{release}-dbgsym with ddebs.ubuntu.com among "
            "the sources, or set DEBUGINFOD_URLS=https://debuginfod.ubuntu.com"
        )
    if _FEDORA.search(release):
        return (
            f"run dnf debuginfo-install kernel-{release}, or set "
            "DEBUGINFOD_URLS=https://debuginfod.fedoraproject.org"
        )
    if _SUSE.search(release):
        return (
            "run zypper install kernel-default-debuginfo, or set "
            "DEBUGINFOD_URLS=https://debuginfod.opensuse.org"
        )
    if _ARCH.search(release):
        return "set DEBUGINFOD_URLS=https://debuginfod.archlinux.org"
    return "build the kernel with CONFIG_DEBUG_INFO_DWARF5=y and name its vmlinux"


def image_advice(release: str | None) -> str:
    """Say in an imperative clause how to get the boot image, modules and configuration."""
    if release is None:
        return "name the folder of the whole kernel"
    if _DEBIAN.search(release):
        return f"run apt install linux-image-{release}, or name it deb:linux-image-{release}"
    if _UBUNTU.search(release):
        return f"run apt install linux-image-{release} linux-modules-{release}"
    if _FEDORA.search(release):
        return f"run dnf install kernel-core-{release} kernel-modules-{release}"
    if _SUSE.search(release):
        return "run zypper install kernel-default"
    if _ARCH.search(release):
        return "run pacman -S linux, for the release that it has"
    return "run make install modules_install in the build tree, or name the tree"
