"""A TD on the fake engine: `make_td(**config)` builds one, `td` is one with defaults."""

import pytest
from fake_td import build_td

from trapline.rules.tables import load


@pytest.fixture
def rules():
    return load("1.5.01")


@pytest.fixture
def make_td():
    return build_td


@pytest.fixture
def td(make_td):
    return make_td()
