"""What the guest does under each design: read a disk, fetch a page, write to a console.

Each part has a result that the host checks: a design under which the data were wrong would
have numbers without a meaning.
"""

import hashlib
import http.server
import random
import threading
from pathlib import Path
from typing import Final, Self

from trapline.base import files
from trapline.base.errors import BadInputFileError
from trapline.machine.loader.initramfs import workload
from trapline.results.tradeoff import WorkStep

DISK_SIZE: Final = 4 << 20
PAGE_SIZE: Final = 64 << 10
CONSOLE_LINES: Final = 50
MODULES: Final = ("virtio_blk", "virtio_net")
COMMAND_LINE: Final = "console=ttyS0 quiet"
_MAX_CONSOLE: Final = 1 << 20  # bytes
_SEED: Final = 20210914
_LINE: Final = "a line of console output"

_COMMANDS: Final = """\
say "disk $(busybox sha256sum /dev/vda)"
busybox ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
say "page $(busybox wget -q -O - http://10.0.2.2:{port}/ | busybox sha256sum)"
for number in $(busybox seq {lines}); do echo "{line} $number"; done > /dev/hvc0
busybox stty -F /dev/hvc0 sane
say "console done"
"""


class Workload:
    """The host's side of it, in `folder`; use as a context manager.

    `init` is the guest's /init, `devices` are `--device` arguments.
    """

    def __init__(self, folder: Path) -> None:
        source = random.Random(_SEED)  # noqa: S311 - data to compare, no secret
        disk, self._page = source.randbytes(DISK_SIZE), source.randbytes(PAGE_SIZE)
        self._image, self._console = folder / "disk.img", folder / "console.log"
        files.write_whole(self._image, [disk])
        self._sums = {name: hashlib.sha256(data).hexdigest() for name, data in
                      (("disk", disk), ("page", self._page))}  # fmt: skip
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self._page))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def init(self) -> str:
        """The guest's part."""
        port = self._server.server_address[1]
        return workload(_COMMANDS.format(port=port, lines=CONSOLE_LINES, line=_LINE))

    @property
    def devices(self) -> tuple[str, ...]:
        """What it needs."""
        return (f"blk,file={self._image}", "net", f"console,file={self._console}")

    def check(self, output: bytes) -> tuple[WorkStep, ...]:
        """Look at what the guest printed on its serial port, and at the virtio console."""
        text = output.decode(errors="replace")
        written = self._written()
        return (
            WorkStep(name="boot", passed="init: began" in text),
            WorkStep(name="disk read", passed=f"disk {self._sums['disk']}" in text),
            WorkStep(name="network request", passed=f"page {self._sums['page']}" in text),
            WorkStep(
                name="console output",
                passed=all(f"{_LINE} {n}" in written for n in (1, CONSOLE_LINES)),
            ),
        )

    def _written(self) -> str:
        """Read what came out of the virtio console: as much as a guest likes."""
        try:
            data = files.read(self._console, limit=_MAX_CONSOLE, what="a console's output")
        except BadInputFileError:
            return ""
        return data.decode(errors="replace")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(page: bytes) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as inherited
            del format, args

    return Handler
