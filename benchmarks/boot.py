"""Measures a boot as a TD against QEMU booting the same files as an ordinary VM.

    python benchmarks/boot.py [KERNEL] [ROUNDS]

Both get the same bzImage, the same initrd (busybox that prints one line and powers off) and
the same command line, one vCPU and 512 MiB; QEMU as `qemu-system-x86_64 -accel tcg -cpu max`.
Rounds alternate, so that other load on the machine hits both alike; times are wall clock from
the start of the process to its end, and the fastest round of each counts. Asked for: at most
2.0 x QEMU's time, and a peak RSS of at most guest memory + 350 MiB.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trapline.kernel.find.deb import fetch_package
from trapline.kernel.find.locate import locate
from trapline.machine.loader import initramfs, kernelimage
from trapline.machine.machine import Machine, MachineConfig

DEFAULT = "deb:linux-image-6.12-cloud-amd64|linux-image-cloud-amd64"
COMMAND_LINE = "console=ttyS0,115200 earlyprintk=ttyS0,115200"
MEMORY = 512 << 20
READY = b"benchmark: userspace is up"


def boot_td(image: str, initrd: str) -> None:
    """Boot as a TD in this process, and print what `td` reads."""
    lines: list[bytes] = []
    config = MachineConfig(
        image=kernelimage.open_image(Path(image)),
        command_line=COMMAND_LINE,
        initrd=Path(initrd).read_bytes(),
        memory=MEMORY,
        echo=lines.append,
    )
    machine = Machine(config)
    outcome = machine.run()
    if READY not in b"".join(lines):
        raise SystemExit(f"the TD did not reach userspace: {outcome}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(sum(machine.recorder.ve.values()), peak)


def td(image: Path, initrd: Path) -> tuple[float, int, int]:
    """Time one boot as a TD: seconds, #VEs, peak RSS in KiB."""
    command = [sys.executable, __file__, "--child", str(image), str(initrd)]
    started = time.perf_counter()
    words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return time.perf_counter() - started, int(words[0]), int(words[1])


def qemu(image: Path, initrd: Path) -> float:
    """Time one boot as an ordinary VM, in seconds."""
    command = [
        *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", str(MEMORY >> 20)),
        *("-nodefaults", "-nographic", "-serial", "stdio", "-no-reboot"),
        *("-kernel", str(image), "-initrd", str(initrd), "-append", COMMAND_LINE),
    ]
    started = time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, timeout=300).stdout
    elapsed = time.perf_counter() - started
    if READY not in output:
        raise SystemExit("the VM did not reach userspace")
    return elapsed


def main(arguments: list[str]) -> int:
    """Alternate both, and print the ratio."""
    if arguments[:1] == ["--child"]:
        boot_td(arguments[1], arguments[2])
        return 0
    kernel = locate(arguments[0] if arguments else DEFAULT, announce=print)
    rounds = int(arguments[1]) if len(arguments) > 1 else 3
    if kernel.vmlinuz is None:
        print("no boot image: nothing to compare")
        return 2
    busybox = (fetch_package("busybox-static") / "bin/busybox").read_bytes()
    commands = f"busybox echo '{READY.decode()}'\n"
    with tempfile.NamedTemporaryFile(suffix=".cpio") as initrd:
        initrd.write(initramfs.self_test(busybox, init=initramfs.workload(commands)))
        initrd.flush()
        tds, vms = [], []
        for _ in range(rounds):
            vms.append(qemu(kernel.vmlinuz, Path(initrd.name)))
            tds.append(td(kernel.vmlinuz, Path(initrd.name)))
    best, best_vm = min(tds), min(vms)
    print(f"{kernel.release}, bzImage to power-off, 512 MiB, 1 VCPU, fastest of {rounds}")
    print(f"QEMU TCG, ordinary VM    {best_vm:6.2f} s")
    print(f"trapline, TD             {best[0]:6.2f} s   ({best[1]:,} #VEs)")
    print(f"ratio                    {best[0] / best_vm:6.2f}     (asked for: at most 2.0)")
    over = max(run[2] for run in tds) / 1024 - (MEMORY >> 20)
    print(f"peak RSS over the guest's {over:5.0f} MiB (asked for: at most 350)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
