"""What tests with a real kernel and QEMU's devices share: one boot, and what it said."""

from contextlib import ExitStack

from trapline.boot.plan import BootOptions, make_plan, open_symbols, parse_devices
from trapline.boot.run import BootRun
from trapline.machine.loader.initramfs import workload


class Guest:
    """One run of a kernel with devices; `lines` are what /init said."""

    def __init__(self, files, commands, devices, insmod, *, symbols=False, scan=None, **options):
        board, requests = parse_devices(devices)
        plan = make_plan(
            files,
            BootOptions(
                insmod=insmod,
                init=workload(commands),
                board=board,
                devices=requests,
                command_line="console=ttyS0 quiet",
                timeout=400,
                **options,
            ),
        )
        self.console = bytearray()
        with ExitStack() as stack:
            vmlinux = open_symbols(plan) if symbols else None
            if vmlinux is not None:
                stack.enter_context(vmlinux)
            run = stack.enter_context(
                BootRun(plan, vmlinux, reproduce="", echo=self.console.extend, scan=scan)
            )
            self.outcome = run.run()
            self.result = run.result(self.outcome, scan)
        self.refused = list(self.result.refused.dma)
        text = self.console.decode(errors="replace")
        self.lines = [
            line.removeprefix("init: ").rstrip()
            for line in text.splitlines()
            if line.startswith("init: ")
        ]
