"""Finding kernels in made-up systems, package trees and build trees."""

import errno
import gzip
import lzma
import os
from pathlib import Path

import pytest
import zstandard

from elf_images import (
    SHF_ALLOC,
    SHF_EXECINSTR,
    Part,
    boot_image,
    build_elf,
    module,
    vmlinux,
    zlib_gzip,
)
from trapline.base.errors import BadImageError, KernelNotFoundError
from trapline.kernel.find import deb, layouts
from trapline.kernel.find.locate import kind_of, locate

RELEASE = "6.12.1-test"
CONFIG = (
    '# comment\nCONFIG_INTEL_TDX_GUEST=y\nCONFIG_NAME="a b"\n# CONFIG_X is not set\nCONFIG_N=5\n'
)
OPTIONS = {"CONFIG_INTEL_TDX_GUEST": "y", "CONFIG_NAME": "a b", "CONFIG_N": "5"}


def put(path: Path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def identifier(number):
    return bytes([number]) * 20


def debian(root, release=RELEASE, *, debug=True):
    """The trees of linux-image-RELEASE and, where wanted, of its -dbg package."""
    put(root / f"boot/vmlinuz-{release}", boot_image(vmlinux(release, dwarf=False)))
    put(root / f"boot/config-{release}", CONFIG)
    put(root / f"boot/System.map-{release}", "")
    base = root / f"lib/modules/{release}"
    put(base / "modules.builtin", "kernel/fs/mbcache.ko\n")
    put(base / "modules.builtin.modinfo", "mbcache.license=GPL\0")
    net, fs = "kernel/drivers/net/virtio_net.ko", "kernel/fs/9p/9p-fs.ko"
    put(base / f"{net}.xz", lzma.compress(module(release, identifier=identifier(1))))
    put(base / f"{fs}.zst", zstandard.compress(module(release, identifier=identifier(2))))
    if debug:
        debug_root = root / "usr/lib/debug"
        put(debug_root / f"boot/vmlinux-{release}", vmlinux(release))
        whole = debug_root / f"lib/modules/{release}"
        put(whole / net, module(release, dwarf=True, identifier=identifier(1)))
        put(whole / fs, module(release, dwarf=True, identifier=identifier(2)))
    return root


def check_whole(files, root):
    assert files.release == RELEASE
    assert files.vmlinux == root / f"usr/lib/debug/boot/vmlinux-{RELEASE}"
    assert files.vmlinuz == root / f"boot/vmlinuz-{RELEASE}"
    assert files.modules_dir == root / f"lib/modules/{RELEASE}"
    assert [(m.name, m.location) for m in files.modules] == [
        ("virtio_net", "kernel/drivers/net/virtio_net.ko"),
        ("9p_fs", "kernel/fs/9p/9p-fs.ko"),
    ]
    assert all(m.debug_matches() for m in files.modules)
    assert files.config == OPTIONS
    assert files.builtin_list.name == "modules.builtin"
    assert files.builtin_modinfo.name == "modules.builtin.modinfo"
    assert files.missing == ()


@pytest.mark.parametrize(
    "place",
    [
        "",
        f"boot/vmlinuz-{RELEASE}",
        f"usr/lib/debug/boot/vmlinux-{RELEASE}",
        f"lib/modules/{RELEASE}",
        "lib/modules",
        "lib",
    ],
)
def test_any_part_of_a_debian_tree_leads_to_the_whole(tmp_path, place):
    root = debian(tmp_path)
    check_whole(locate(str(root / place)), root)


def test_release_on_an_installed_system(tmp_path):
    root = debian(tmp_path)
    debian(root, "5.10.0-other")
    check_whole(locate(RELEASE, root=root), root)


def test_folder_around_a_tree(tmp_path):
    root = debian(tmp_path / "unpacked")
    check_whole(locate(str(tmp_path)), root)


def test_without_the_debug_package(tmp_path):
    files = locate(str(debian(tmp_path, "6.12.1+deb13-amd64", debug=False)))
    assert files.vmlinux is None
    assert [m.debug for m in files.modules] == [None, None]
    assert not files.modules[0].debug_matches()
    package = "linux-image-6.12.1+deb13-amd64"
    advice = f"run apt install {package}-dbg, or name it deb:{package}."
    assert files.missing == (
        f"No vmlinux of 6.12.1+deb13-amd64, so no debug information: {advice}",
        f"2 of 2 modules have no debug information: {advice}",
    )


def test_debug_package_alone_has_whole_modules(tmp_path):
    debian(tmp_path)
    only_debug = tmp_path / "only"
    only_debug.mkdir()
    (tmp_path / "usr").rename(only_debug / "usr")
    files = locate(str(only_debug))
    assert [m.path == m.debug for m in files.modules] == [True, True]
    assert files.vmlinuz is None
    assert any("cannot be booted" in sentence for sentence in files.missing)


def test_debug_modules_of_another_build_are_not_used(tmp_path):
    root = debian(tmp_path)
    for path in (root / "usr/lib/debug/lib").rglob("*.ko"):
        path.write_bytes(module(dwarf=True, identifier=identifier(9)))
    files = locate(str(root))
    assert [m.debug for m in files.modules] == [None, None]
    assert "not of the same build" in files.missing[0]


def test_boot_image_of_another_build_is_not_used(tmp_path):
    root = debian(tmp_path)
    image = boot_image(vmlinux(dwarf=False), version=f"{RELEASE} (someone) #2 SMP")
    put(root / f"boot/vmlinuz-{RELEASE}", image)
    files = locate(str(root))
    assert files.vmlinuz is None
    assert "is not of the same build" in files.missing[0]


def test_vmlinux_with_debug_information_is_preferred(tmp_path):
    root = debian(tmp_path)
    put(root / f"usr/lib/debug/boot/vmlinux-{RELEASE}", vmlinux(dwarf=False))
    whole = put(root / f"lib/modules/{RELEASE}/build/vmlinux", vmlinux())
    assert locate(str(root)).vmlinux == whole
    whole.unlink()
    files = locate(str(root))
    assert files.vmlinux == root / f"usr/lib/debug/boot/vmlinux-{RELEASE}"
    assert "has no debug information" in files.missing[0]


def test_fedora(tmp_path):
    release = "6.9.4-200.fc40.x86_64"
    base = tmp_path / f"usr/lib/modules/{release}"
    (tmp_path / "lib").symlink_to("usr/lib")
    put(base / "vmlinuz", boot_image(vmlinux(release, dwarf=False)))
    put(base / "config", CONFIG)
    put(base / "kernel/net/a.ko.xz", lzma.compress(module(release)))
    debug = tmp_path / f"usr/lib/debug/lib/modules/{release}"
    files = locate(release, root=tmp_path)
    assert files.vmlinux is None
    assert f"dnf debuginfo-install kernel-{release}" in files.missing[0]
    put(debug / "vmlinux", vmlinux(release))
    put(debug / "kernel/net/a.ko.debug", module(release, dwarf=True))
    files = locate(release, root=tmp_path)
    assert files.vmlinux == debug / "vmlinux"
    assert files.vmlinuz == base / "vmlinuz"
    assert files.config == OPTIONS
    assert len(files.modules) == 1
    assert files.modules[0].debug == debug / "kernel/net/a.ko.debug"


def test_arch_takes_the_configuration_from_the_kernel(tmp_path):
    release = "6.9.3-arch1-1"
    embedded = b"IKCFG_ST no IKCFG_ST" + zlib_gzip(CONFIG.encode()) + b"IKCFG_ED"
    banner = f"Linux version {release} (a@b) (gcc) #1 SMP\n".encode()
    kernel = build_elf([Part(".rodata", banner + embedded, flags=SHF_ALLOC)])
    base = tmp_path / f"usr/lib/modules/{release}"
    put(base / "vmlinuz", boot_image(kernel, version=f"{release} (a@b) #1 SMP"))
    put(base / "kernel/a.ko.zst", zstandard.compress(module(release)))
    files = locate(release, root=tmp_path)
    assert files.config == OPTIONS
    assert "debuginfod.archlinux.org" in files.missing[0]
    assert locate(str(put(tmp_path / "vmlinux", kernel))).config == OPTIONS


def build_tree(tree):
    put(tree / "vmlinux", vmlinux())
    put(tree / "arch/x86/boot/bzImage", boot_image(vmlinux(dwarf=False)))
    put(tree / ".config", CONFIG)
    put(tree / "include/config/kernel.release", RELEASE + "\n")
    put(tree / "modules.builtin.modinfo", "")
    put(tree / "drivers/net/virtio_net.ko", module(dwarf=True))
    put(tree / ".git/x/old.ko", module())
    return tree


def test_build_tree(tmp_path):
    tree = build_tree(tmp_path / "linux")
    for spec in (tree, tree / "vmlinux"):
        files = locate(str(spec))
        assert files.release == RELEASE
        assert files.vmlinux == tree / "vmlinux"
        assert files.vmlinuz == tree / "arch/x86/boot/bzImage"
        assert files.modules_dir == tree
        assert [m.location for m in files.modules] == ["kernel/drivers/net/virtio_net.ko"]
        assert files.modules[0].debug == files.modules[0].path
        assert files.missing == ()


@pytest.mark.parametrize(("options", "said"), [("CONFIG_MODULES=y\n", 1), ("CONFIG_X=y\n", 0)])
def test_a_kernel_without_modules_lacks_none(tmp_path, options, said):
    tree = tmp_path / "linux"
    put(tree / "vmlinux", vmlinux(RELEASE))
    put(tree / ".config", options)
    put(tree / "include/config/kernel.release", RELEASE + "\n")
    put(tree / "modules.order", "")
    files = locate(str(tree))
    assert sum("No modules" in sentence for sentence in files.missing) == said


def test_modules_from_elsewhere(tmp_path):
    root = debian(tmp_path / "debian")
    tree = build_tree(tmp_path / "linux")
    expected = root / f"lib/modules/{RELEASE}"
    for folder in (root, expected):
        assert locate(str(tree), folder).modules_dir == expected
        assert locate(str(tree / "arch/x86/boot/bzImage"), folder).modules_dir == expected
    plain = tmp_path / "plain"
    put(plain / "one.ko.gz", gzip.compress(module()))
    assert [m.location for m in locate(str(root), plain).modules] == ["one.ko"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(KernelNotFoundError, match="holds no modules"):
        locate(str(root), tmp_path / "empty")
    with pytest.raises(KernelNotFoundError, match="no such folder of modules"):
        locate(str(root), tmp_path / "absent")


def test_lone_files(tmp_path):
    files = locate(str(put(tmp_path / "vmlinux", vmlinux())))
    assert (files.release, files.vmlinuz, files.modules) == (RELEASE, None, ())
    files = locate(str(put(tmp_path / "vmlinuz", boot_image(vmlinux()))))
    assert (files.release, files.vmlinux) == (RELEASE, None)
    files = locate(str(put(tmp_path / "a-b.ko.xz", lzma.compress(module()))))
    assert [m.name for m in files.modules] == ["a_b"]
    assert files.release == RELEASE
    assert "1 of 1 modules have no debug information" in files.missing[0]


def test_module_of_an_installed_kernel_finds_its_debug_file(tmp_path):
    root = debian(tmp_path)
    path = root / f"lib/modules/{RELEASE}/kernel/drivers/net/virtio_net.ko.xz"
    files = locate(str(path))
    assert [m.path for m in files.modules] == [path]
    assert files.modules[0].debug_matches()
    assert files.config == OPTIONS


def test_flat_folder(tmp_path):
    put(tmp_path / "vmlinux", vmlinux())
    put(tmp_path / "vmlinuz", boot_image(vmlinux()))
    put(tmp_path / "one.ko", module())
    files = locate(str(tmp_path))
    assert files.vmlinux == tmp_path / "vmlinux"
    assert files.vmlinuz == tmp_path / "vmlinuz"
    assert [m.location for m in files.modules] == ["one.ko"]
    put(tmp_path / "vmlinux.old", vmlinux())
    with pytest.raises(KernelNotFoundError, match=r"several kernels \(vmlinux, vmlinux.old\)"):
        locate(str(tmp_path))


def test_updates_win_over_the_kernels_own_modules(tmp_path):
    root = debian(tmp_path)
    own = put(root / f"lib/modules/{RELEASE}/updates/dkms/virtio_net.ko", module(dwarf=True))
    found = {m.name: m for m in locate(str(root)).modules}
    assert found["virtio_net"].path == found["virtio_net"].debug == own


def test_several_kernels_are_named(tmp_path):
    debian(tmp_path)
    debian(tmp_path, "6.1.0-old")
    with pytest.raises(KernelNotFoundError, match=rf"several kernels \(6.1.0-old, {RELEASE}\)"):
        locate(str(tmp_path))
    outer = tmp_path / "outer"
    debian(outer / "a")
    debian(outer / "b", "6.1.0-old")
    with pytest.raises(KernelNotFoundError, match=rf"several kernels \({RELEASE}, 6.1.0-old\)"):
        locate(str(outer))


def test_only_some_of_many_kernels_are_named(tmp_path):
    for number in range(9):
        debian(tmp_path / str(number), f"6.1.{number}-test")
    with pytest.raises(KernelNotFoundError, match=r"\(.*6\.1\.4-test and 4 more\); name the"):
        locate(str(tmp_path))


def test_a_folder_that_goes_away_while_it_is_searched(tmp_path, monkeypatch):
    debian(tmp_path / "kernel")

    def gone(*_):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(tmp_path / "kernel"))

    monkeypatch.setattr(layouts, "split", gone)
    with pytest.raises(KernelNotFoundError, match="cannot be searched: no such file"):
        locate(str(tmp_path))


def test_of_a_whole_system_what_the_kernel_makes_up_is_not_searched():
    below = layouts.walk(Path("/"))
    assert not any(str(next(below)).startswith(("/proc/", "/sys/", "/dev/")) for _ in range(5000))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("/no/such/place", "no such file or folder"),
        ("", "no such file or folder"),
        ("../x", "no such file or folder"),
        (
            "6.99.0-none",
            r"no kernel of this release in .*installed: 6\.12\.1-test.*deb:linux-image",
        ),
    ],
)
def test_nothing_there(tmp_path, monkeypatch, spec, message):
    debian(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(KernelNotFoundError, match=message):
        locate(spec, root=tmp_path)


def test_empty_folder_and_empty_system(tmp_path):
    with pytest.raises(KernelNotFoundError, match="holds no vmlinux, vmlinuz or modules"):
        locate(str(tmp_path))
    with pytest.raises(KernelNotFoundError, match="no kernel of this release"):
        locate(RELEASE, root=tmp_path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(BadImageError, match="is not an ELF file"):
        kind_of(put(tmp_path / "x", "hello"))
    root = debian(tmp_path / "root")
    put(root / f"boot/config-{RELEASE}", "<html>")
    with pytest.raises(BadImageError, match="is not a kernel configuration"):
        locate(str(root))


def test_programs_and_libraries_are_no_kernels(tmp_path):
    where = {"kernel": 0xFFFFFFFF81000000, "program": 0x401000, "library": 0x1000}
    for name, address in where.items():
        text = Part(".text", b"\x90" * 64, flags=SHF_ALLOC | SHF_EXECINSTR, address=address)
        put(tmp_path / name, build_elf([text]))
    assert kind_of(tmp_path / "kernel") == ("vmlinux", None)
    for name in ("program", "library"):
        with pytest.raises(BadImageError, match="is a program or a library, not a kernel"):
            locate(str(tmp_path / name))


def test_pipes_and_devices_are_named_as_such(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(KernelNotFoundError, match="is neither a regular file nor a folder"):
            locate(str(special))


def test_links_in_circles_end(tmp_path):
    root = debian(tmp_path)
    base = root / f"lib/modules/{RELEASE}"
    (base / "kernel/loop").symlink_to(base)
    (base / "build").symlink_to(base)
    assert len(locate(str(root)).modules) == 2


def test_package(tmp_path, monkeypatch):
    image, debug = tmp_path / "image", tmp_path / "debug"
    debian(image)
    debug.mkdir()
    (image / "usr").rename(debug / "usr")
    asked = []

    def fetch(spec, *, announce):
        asked.append((spec, announce))
        return image, debug

    monkeypatch.setattr(deb, "fetch_kernel", fetch)
    files = locate("deb:a|b", announce=print)
    assert asked == [("a|b", print)]
    assert files.vmlinux.is_relative_to(debug)
    assert files.vmlinuz.is_relative_to(image)
    assert files.missing == ()


def test_layout_splits_what_it_joins(tmp_path):
    for pattern in (
        *layouts.VMLINUX,
        *layouts.VMLINUZ,
        *layouts.MODULES,
        *layouts.DEBUG_MODULES,
    ):
        place = tmp_path / pattern.format(release=RELEASE)
        assert layouts.split(place) == (tmp_path, RELEASE)
    assert layouts.split(tmp_path / "elsewhere") is None
    assert layouts.split(tmp_path / "boot/vmlinuz-") is None


@pytest.mark.kernel
def test_debian_kernel(debian_kernel):
    assert debian_kernel.missing == ()
    assert debian_kernel.config["CONFIG_INTEL_TDX_GUEST"] == "y"
    assert len(debian_kernel.modules) > 1000
    found = {m.name: m for m in debian_kernel.modules}
    assert found["virtio_net"].location == "kernel/drivers/net/virtio_net.ko"
    assert found["virtio_net"].debug_matches()
    assert kind_of(debian_kernel.vmlinux) == ("vmlinux", debian_kernel.release)
    assert kind_of(debian_kernel.vmlinuz) == ("vmlinuz", debian_kernel.release)
