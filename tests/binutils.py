"""GNU as and objdump as the reference that trapline's decoding is held against."""

import re
import subprocess

from iced_x86 import Decoder

_LINE = re.compile(r"^\s*([0-9a-f]+):\t([0-9a-f ]+)\t(.*)$")


class Assembler:
    """Assembles AT&T source into 64-bit code and reads back what binutils makes of it."""

    def __init__(self, folder):
        self._folder = folder
        self._count = 0

    def object(self, source):
        self._count += 1
        path = self._folder / f"{self._count}.o"
        subprocess.run(
            ["as", "--64", "-o", str(path), "-"], input=source + "\n", text=True, check=True
        )
        return path

    def code(self, source):
        """Return the bytes of .text; nothing in the source may need a relocation."""
        path = self.object(source)
        raw = path.with_suffix(".bin")
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", path, raw], check=True)
        return raw.read_bytes()

    def instruction(self, source):
        """Return the one instruction that the source assembles to."""
        code = self.code(source)
        found = list(Decoder(64, code, ip=0))
        assert len(found) == 1, f"{source!r} is not one instruction: {found}"
        assert found[0].len == len(code)
        return found[0]

    def objdump(self, source):
        """Return (bytes, text) of each instruction as objdump prints it, spaces squeezed."""
        listing = subprocess.run(
            ["objdump", "-d", "--insn-width=15", str(self.object(source))],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for line in listing.splitlines():
            if match := _LINE.match(line):
                text = re.sub(r"\s*(#|<).*$", "", match.group(3))
                yield bytes.fromhex(match.group(2)), " ".join(text.split())
