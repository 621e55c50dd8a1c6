"""Debian's own initramfs and udev, with the exported files installed or without them.

Nothing of this machine is changed: the files lie over its /etc, /boot and /usr/lib in a mount
namespace, where mkinitramfs finds them as if they had been copied there.
"""

import os
import shutil
import stat
import subprocess
from pathlib import Path

# mkinitramfs and mke2fs are no commands of users who are not root.
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PACKAGES = {
    "udevadm": "udev",
    "depmod": "kmod",
    "mkinitramfs": "initramfs-tools-core",
    "busybox": "busybox",
    "mke2fs": "e2fsprogs",
    "unshare": "util-linux",
}
# What goes into the initramfs; that of a real installation has all (MODULES=most).
MODULES = "virtio_blk virtio_net vmxnet3"
_MODULES_HOOK = f"""\
#!/bin/sh
[ "$1" = prereqs ] && exit 0
. /usr/share/initramfs-tools/hook-functions
manual_add_modules {MODULES}
"""
_MAKE = """\
set -e
over() { mount -t overlay -o "lowerdir=$1:$2" overlay "$2"; }
over "$1/usr/lib" /usr/lib
over "$1/boot" /boot
over "$1/etc" /etc
exec mkinitramfs -c gzip -l 1 -o "$2" "$3"
"""


def namespace():
    """Return the words that start a command in a mount namespace of its own, None for none."""
    probe = "mount -t overlay -o lowerdir=/usr/lib:/etc overlay /etc"
    for words in (["unshare", "--map-root-user", "--mount"], ["unshare", "--mount"]):
        done = subprocess.run(
            [*words, "sh", "-c", probe], capture_output=True, env=environment(), check=False
        )
        if done.returncode == 0:
            return words
    return None


def environment(**more):
    return {**os.environ, "PATH": PATH, "LC_ALL": "C", **more}


def lacking():
    """Say in one sentence what this machine lacks to make an initramfs; "" for nothing."""
    missing = [p for tool, p in PACKAGES.items() if shutil.which(tool, path=PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return "" if namespace() else "no mount namespace with an overlay can be had here"


class Machine:
    """The guest's files: `install` is what lies over those of this machine."""

    def __init__(self, folder, kernel):
        self.folder = folder
        self.release = kernel.release
        self.modules = folder / "base" / "usr" / "lib" / "modules" / kernel.release
        shutil.copytree(kernel.modules_dir, self.modules)
        # As in a package, but depmod finds the modules below lib.
        (folder / "base" / "lib").symlink_to("usr/lib")
        subprocess.run(
            ["depmod", "-b", str(folder / "base"), kernel.release], env=environment(), check=True
        )
        boot = folder / "base" / "boot"
        boot.mkdir()
        config = "".join(f"{name}={value}\n" for name, value in kernel.config.items())
        (boot / f"config-{kernel.release}").write_text(config)

    def initramfs(self, exported, *, most=False):
        """Make Debian's initramfs with these files installed; returns it and its tree.

        With `most`, it has the modules that it would have by default.
        """
        over = self.folder / "over"
        shutil.copytree(self.folder / "base", over, symlinks=True, copy_function=os.link)
        place(over, exported)
        settings = over / "etc" / "initramfs-tools"
        settings.mkdir(parents=True, exist_ok=True)
        if not most:
            # What /etc/initramfs-tools/modules names would be loaded whoever has it.
            place(settings, {"conf.d/modules": "MODULES=list\n", "hooks/few": _MODULES_HOOK})
        image = self.folder / "initrd.img"
        subprocess.run(
            [*namespace(), "sh", "-c", _MAKE, "make", str(over), str(image), self.release],
            env=environment(TMPDIR=str(self.folder)),
            check=True,
        )
        tree = self.folder / "tree"
        subprocess.run(["unmkinitramfs", str(image), str(tree)], env=environment(), check=True)
        return image, tree if (tree / "init").exists() else tree / "main"

    def root(self, tree, exported, init):
        """Make a root file system with udev, kmod, busybox and the files; returns its image."""
        root = self.folder / "root"
        shutil.copytree(tree, root, symlinks=True, copy_function=os.link)
        shutil.rmtree(root / "scripts")
        (root / "init").unlink()
        # The initramfs has ten of the rules.
        shutil.copytree("/usr/lib/udev/rules.d", root / "usr/lib/udev/rules.d", dirs_exist_ok=True)
        place(root, exported)
        for folder in ("dev", "proc", "sys", "run", "root"):
            (root / folder).mkdir(exist_ok=True)
        place(root, {"usr/sbin/init": init})
        (root / "usr/sbin/init").chmod(0o755)
        image = self.folder / "root.ext4"
        subprocess.run(
            ["mke2fs", "-q", "-t", "ext4", "-d", str(root), str(image), "192M"],
            env=environment(),
            check=True,
            capture_output=True,
        )
        return image


def place(folder: Path, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(stat.S_IMODE(path.stat().st_mode) | (0o111 if text.startswith("#!") else 0))
