"""Sizes and times on the command line: 512M, 1G, 4096K, or bytes; seconds."""

import re
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    _Base = click.ParamType[int]
    _FloatBase = click.ParamType[float]
else:
    _Base = _FloatBase = click.ParamType  # not subscriptable in click 8.1

_MAX_SECONDS: Final = 1_000_000_000
_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SIZE: Final = re.compile(r"(\d{1,12})([KMG]?)i?B?", re.IGNORECASE)


class SizeType(_Base):
    """Turns the text of a size into bytes."""

    name = "SIZE"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Parse, or fail with a sentence."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value))
        if match is None:
            self.fail(f"{value!r} is no size; write 512M, 1G or a number of bytes.", param, ctx)
        return int(match[1]) * _UNITS[match[2].upper()]


class SecondsType(_FloatBase):
    """Turns text into a number of seconds that a timer can take."""

    name = "SECONDS"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse, or fail with a sentence."""
        try:
            seconds = float(str(value))
        except ValueError:
            self.fail(f"{value!r} is no number of seconds.", param, ctx)
        # Written so that NaN fails too.
        if not 0 < seconds <= _MAX_SECONDS:
            self.fail(f"{value!r} is not between 0 and {_MAX_SECONDS:,} seconds.", param, ctx)
        return seconds


SIZE: Final = SizeType()
SECONDS: Final = SecondsType()
