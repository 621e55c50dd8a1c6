"""Which trapline this is: the one place that names a release; hatchling reads it from here."""

from typing import Final

__version__ = "0.1.0"

#: What result documents say they were made by.
GENERATOR: Final = f"trapline {__version__}"
