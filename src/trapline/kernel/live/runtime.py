"""Run-time addresses of a guest, back to functions, source lines and inline chains.

A kernel runs where KASLR put it, its modules where there was room, and before it the boot
image's decompressor runs at a physical address. `RuntimeSymbols` knows these places and turns
an address into a `Location` whose label reads as the kernel's own `%pS`.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from trapline.kernel.binary import TextSection
    from trapline.kernel.elf.functions import Symbol
    from trapline.kernel.live.orc import OrcEntry, OrcTable
    from trapline.results.scan import Frame

# KERNEL_IMAGE_SIZE with RANDOMIZE_BASE, and the smallest CONFIG_PHYSICAL_ALIGN: the kernel's
# base is a multiple of the one below the other (page_64_types.h; find_random_virt_addr(),
# arch/x86/boot/compressed/kaslr.c).
KERNEL_IMAGE_SIZE: Final = 1 << 30
PHYSICAL_ALIGN: Final = 2 << 20
# __START_KERNEL_map (page_64_types.h): link-time addresses are physical ones plus this.
KERNEL_MAP: Final = 0xFFFF_FFFF_8000_0000
_MAX_KNOWN: Final = 1 << 16  # a hostile guest may trap at any number of addresses

ReadMemory = Callable[[int, int], bytes | None]


class LinkedImage(Protocol):
    """What is needed of a `trapline.kernel.binary.Binary` here."""

    name: str

    @property
    def text(self) -> "tuple[TextSection, ...]":
        """The code, at link-time addresses."""

    def symbol_at(self, address: int) -> "Symbol | None":
        """Return the function or label that owns an address."""

    def chain(self, address: int) -> "tuple[Frame, ...]":
        """Return the frames of an address, innermost first, the out-of-line function last."""


class Span(NamedTuple):
    """`size` bytes of code that run at `start` and were linked at `link`."""

    start: int
    size: int
    link: int


class Location(NamedTuple):
    """What is known of one run-time address.

    `image` is "vmlinux", a module's name, "decompressor", "user" or "" where nothing is known.
    `frames` are as `LinkedImage.chain`; `offset` and `size` are bytes of the function.
    """

    address: int
    image: str
    link_address: int | None = None
    function: str | None = None
    offset: int = 0
    size: int = 0
    frames: "tuple[Frame, ...]" = ()

    @property
    def label(self) -> str:
        """The address as printk's %pS gives it."""
        if self.function is None:
            if self.image in {"decompressor", "user"}:
                return f"{self.image}+{self.offset:#x}"
            where = f" [{self.image}]" if self.image not in {"", "vmlinux"} else ""
            return f"{self.address:#x}{where}"
        text = f"{self.function}+{self.offset:#x}"
        if self.size:  # labels in assembly have none
            text += f"/{self.size:#x}"
        return text if self.image == "vmlinux" else f"{text} [{self.image}]"

    @property
    def source(self) -> str | None:
        """`file:line` of the innermost frame."""
        if not self.frames or self.frames[0].file is None:
            return None
        return f"{self.frames[0].file}:{self.frames[0].line or '?'}"


class _Placed(NamedTuple):
    span: Span
    image: LinkedImage
    orc: "OrcTable | None"
    orc_bias: int  # run-time address minus the one in `orc`


class RuntimeSymbols:
    """Where the code of one guest runs. Starts out knowing nothing; `place` adds to it."""

    def __init__(self) -> None:
        self._placed: list[_Placed] = []
        self._starts: list[int] = []
        self._decompressor: range | None = None
        self._known: dict[tuple[int, bool], Location] = {}
        #: Run-time minus link-time address of vmlinux, None while that is not known.
        self.slide: int | None = None

    def place(
        self,
        image: LinkedImage,
        spans: Iterable[Span],
        orc: "OrcTable | None" = None,
        *,
        orc_bias: int = 0,
    ) -> None:
        """Add code of an image; what it overlaps is replaced, as by a newly loaded module.

        `orc_bias` is what to take off a run-time address before looking it up in `orc`.
        """
        for span in spans:
            if span.size <= 0:
                continue
            end = span.start + span.size
            self._placed = [
                old
                for old in self._placed
                if old.span.start >= end or old.span.start + old.span.size <= span.start
            ]
            self._placed.append(_Placed(span, image, orc, orc_bias))
        self._placed.sort(key=lambda placed: placed.span.start)
        self._starts = [placed.span.start for placed in self._placed]
        self._known.clear()

    def place_vmlinux(
        self,
        image: LinkedImage,
        slide: int,
        orc: "OrcTable | None" = None,
        physical: int | None = None,
    ) -> None:
        """Add vmlinux at a slide (bytes).

        `physical` is the GPA of link-time KERNEL_MAP: until it jumps to its high mapping,
        head_64.S runs identity-mapped, and so does what it calls.
        """
        self.slide = slide
        for offset in (slide,) if physical is None else (slide, physical - KERNEL_MAP):
            spans = (
                Span(part.address + offset, len(part.data), part.address) for part in image.text
            )
            self.place(image, spans, orc, orc_bias=offset)

    def place_decompressor(self, start: int, size: int) -> None:
        """Say where the boot image's own code is; it has no symbols."""
        self._decompressor = range(start, start + size)
        self._known.clear()

    def is_text(self, address: int) -> bool:
        """Whether the address is in code of vmlinux or of a module."""
        return self._find(address) is not None

    def find_orc(self, address: int) -> "OrcEntry | None":
        """Return the ORC entry of a run-time address, None for code without one."""
        placed = self._find(address)
        if placed is None or placed.orc is None:
            return None
        return placed.orc.find(address - placed.orc_bias)

    def link_address(self, address: int) -> tuple[str, int] | None:
        """Return image name and link-time address, None outside of known code."""
        placed = self._find(address)
        if placed is None:
            return None
        return placed.image.name, address - placed.span.start + placed.span.link

    def locate(self, address: int, *, is_call: bool = False, is_user: bool = False) -> Location:
        """Describe an address; `is_call` for a return address, which is one past its call.

        The offset is that of `address` itself, as in %pB.
        """
        if is_user:
            return Location(address, "user", offset=address)
        key = address, is_call
        location = self._known.get(key)
        if location is None:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            location = self._known[key] = self._locate(address, 1 if is_call else 0)
        return location

    def _locate(self, address: int, back: int) -> Location:
        placed = self._find(address - back)
        if placed is None:
            if self._decompressor is not None and address - back in self._decompressor:
                return Location(address, "decompressor", offset=address - self._decompressor.start)
            return Location(address, "")
        link = address - placed.span.start + placed.span.link
        symbol = placed.image.symbol_at(link - back)
        if symbol is None and back:
            # A guess may be a pointer to a function instead of a return address.
            symbol, back = placed.image.symbol_at(link), 0
        frames = placed.image.chain(link - back)
        if symbol is None:
            return Location(address, placed.image.name, link, frames=frames)
        return Location(
            address,
            placed.image.name,
            link,
            symbol.name,
            link - symbol.address,
            symbol.size,
            frames,
        )

    def _find(self, address: int) -> _Placed | None:
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        placed = self._placed[index]
        return placed if address < placed.span.start + placed.span.size else None


def detect_slide(read: ReadMemory, landmark: int, content: bytes) -> int | None:
    """Find where KASLR put the kernel, by looking for bytes that do not change at run time.

    `landmark` is the link-time address of `content`; linux_banner serves well: it is in rodata,
    unique, and mapped from the first instruction at a kernel address on. Tries the 512 places
    that KASLR can choose. None while the kernel's mapping is not there yet.
    """
    for slide in range(0, KERNEL_IMAGE_SIZE, PHYSICAL_ALIGN):
        address = landmark + slide
        if address + len(content) > 1 << 64:
            break
        if read(address, len(content)) == content:
            return slide
    return None
