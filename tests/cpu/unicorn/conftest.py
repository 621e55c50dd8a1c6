"""What is true of the engine on Unicorn only."""

import pytest

from bare_guest import BareGuest
from trapline.cpu.unicorn import open_engine


@pytest.fixture(autouse=True)
def unicorn(monkeypatch):
    monkeypatch.setattr(BareGuest, "factory", staticmethod(open_engine))
