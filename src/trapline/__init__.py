"""trapline: where a compiled Linux kernel traps to its host, counted, run and tried."""

from importlib.metadata import version

__version__ = version("trapline")
