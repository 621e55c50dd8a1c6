"""Assembly as the bytes that stand in memory: no headers, nothing to relocate."""

import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory


@cache
def assemble(source: str, address: int) -> tuple[bytes, dict[str, int]]:
    """Assemble what runs at an address; returns its bytes, and the address of each label."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "guest.s").write_text(f"{source}\n")
        for command in (
            ["as", "-o", "guest.o", "guest.s"],
            ["ld", "-Ttext", hex(address), "-o", "guest.elf", "guest.o"],
            ["objcopy", "-O", "binary", "-j", ".text", "guest.elf", "guest.bin"],
        ):
            subprocess.run(command, cwd=folder, check=True)
        listing = subprocess.run(
            ["nm", "guest.elf"], cwd=folder, check=True, capture_output=True, text=True
        ).stdout
        labels = {}
        for line in listing.splitlines():
            place, _, label = line.split()
            labels[label] = int(place, 16)
        return (folder / "guest.bin").read_bytes(), labels
