"""What any CPU engine must do: the suite runs on each engine of --engine, or the default one.

    pytest tests/cpu/conformance --engine some.package:open_engine

An engine is named by its module and the `trapline.cpu.engine.Factory` in it.
"""

import importlib

import pytest

from bare_guest import BareGuest

DEFAULT = "trapline.cpu.default:open_engine"


def pytest_generate_tests(metafunc):
    names = metafunc.config.getoption("--engine") or [DEFAULT]
    metafunc.parametrize("factory", names, indirect=True, scope="function")


@pytest.fixture(autouse=True)
def factory(request, monkeypatch):
    """What opens the engine under test; bare guests are opened with it, too."""
    module, _, name = request.param.partition(":")
    opener = getattr(importlib.import_module(module), name)
    monkeypatch.setattr(BareGuest, "factory", staticmethod(opener))
    return opener
