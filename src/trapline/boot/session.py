"""A guest that a person sits at: what its initramfs does."""

from typing import Final, NamedTuple

# What a disk needs on the way to being the root file system, where it is not built in.
DISK_MODULES: Final = ("virtio_pci", "virtio_blk", "ext4")
COMMAND_LINE: Final = "console=ttyS0,115200 quiet"
# A person's patience is the limit: a hundred years of the guest's time.
VIRTUAL_SECONDS: Final = 100 * 365 * 86_400
CONSOLE_LIMIT: Final = 1 << 62

_SHELL: Final = """\
busybox --install -s /bin
busybox ln -s bin /sbin
busybox mkdir -p /tmp /usr /root
busybox ln -s ../bin /usr/bin
export TERM={term} HOME=/root PS1='\\w # '
busybox stty -F /dev/console rows {rows} cols {columns}
echo "A shell in a TD. It powers off when you leave the shell; resize tells it of a new size."
busybox setsid busybox cttyhack busybox sh
busybox stty -F /dev/console sane
busybox poweroff -f
"""
# A disk turns up when its driver has probed it; the first that has an init is the root.
_DISK: Final = """\
busybox mkdir -p /root
busybox stty -F /dev/console rows {rows} cols {columns}
tries=0
while [ $tries -lt 100 ]; do
  for disk in /dev/vda /dev/vda1 /dev/vda2 /dev/vda3; do
    [ -b $disk ] && busybox mount $disk /root 2>/dev/null || continue
    if [ -e /root/sbin/init ] || [ -L /root/sbin/init ]; then
      busybox mount --move /dev /root/dev
      busybox umount /sys /proc
      exec busybox switch_root /root /sbin/init
    fi
    busybox umount /root
  done
  busybox sleep 0.1
  tries=$((tries + 1))
done
echo "There is no file system with a /sbin/init on the disk; here is a shell instead."
"""


class Session(NamedTuple):
    """What a person has in front of them: `rows` by `columns`, and a disk to boot from or not."""

    rows: int = 24
    columns: int = 80
    term: str = "vt100"
    has_disk: bool = False

    @property
    def commands(self) -> str:
        """What /init does once it has loaded the modules."""
        parts = (_DISK if self.has_disk else "") + _SHELL
        term = "".join(letter for letter in self.term if letter.isalnum() or letter in "-_.+")
        return parts.format(rows=self.rows, columns=self.columns, term=term or "vt100")
