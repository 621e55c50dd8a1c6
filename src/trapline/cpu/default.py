"""The engine that a machine gets unless it is given another factory: named here, and only here."""

from trapline.cpu.engine import Factory
from trapline.cpu.unicorn import open_engine as open_unicorn

open_engine: Factory = open_unicorn
