"""Advice on missing parts, by the release names of real distributions."""

import pytest

from trapline.kernel.find.distributions import debug_advice, image_advice


@pytest.mark.parametrize(
    ("release", "debug", "image"),
    [
        ("6.12.117+deb12-cloud-amd64", "linux-image-6.12.117+deb12-cloud-amd64-dbg", "deb:"),
        ("6.1.0-56-amd64", "linux-image-6.1.0-56-amd64-dbg", "deb:linux-image-6.1.0-56-amd64"),
        ("6.8.0-31-generic", "linux-image-unsigned-6.8.0-31-generic-dbgsym", "linux-modules-6.8"),
        ("6.8.0-1008-azure", "linux-image-unsigned-6.8.0-1008-azure-dbgsym", "linux-modules-6.8"),
        ("6.9.4-200.fc40.x86_64", "debuginfo-install kernel-6.9.4", "kernel-core-6.9.4"),
        ("5.14.0-427.el9.x86_64", "debuginfo-install kernel-5.14.0", "kernel-core-5.14.0"),
        ("6.4.0-150600.21-default", "kernel-default-debuginfo", "install kernel-default"),
        ("6.9.3-arch1-1", "debuginfod.archlinux.org", "pacman -S linux"),
        ("6.12.0-rc3+", "CONFIG_DEBUG_INFO_DWARF5=y", "modules_install"),
        (None, "debug package of this kernel", "folder of the whole kernel"),
    ],
)
def test_advice(release, debug, image):
    assert debug in debug_advice(release)
    assert image in image_advice(release)
