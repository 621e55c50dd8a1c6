import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.base.errors import BadInputFileError, UsageError
from trapline.explore import scenario

MINIMAL = b'title = "t"\n[start]\nsymbol = "f"\n[[inject]]\nevent = "nmi"\n'


@pytest.mark.parametrize("name", scenario.shipped())
def test_shipped_scenarios_load_under_their_file_name(name):
    loaded = scenario.load(name)
    assert loaded.name == name
    assert loaded.why


def test_the_mails_corner_cases_are_shipped():
    wanted = {
        "syscall-gap", "swapgs-gap", "iret-gap", "ve-before-veinfo", "nmi-in-ve", "ve-in-nmi",
        "mmio-in-ve", "console-in-nmi", "irq-in-ve", "int80", "notification-ve", "mce-in-ve",
    }  # fmt: skip
    assert wanted <= set(scenario.shipped())


def test_a_users_file_is_read_like_a_shipped_one(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(MINIMAL)
    assert scenario.load(str(path)).name == "mine"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINIMAL.replace(b'"nmi"', b'"nmy"'), "'nmy' is not an event"),
        (MINIMAL.replace(b'symbol = "f"', b""), "it has none"),
        (MINIMAL.replace(b'symbol = "f"', b'symbol = "f"\nnmi = "g"'), "symbol and nmi"),
        (MINIMAL.replace(b'symbol = "f"', b'syscall = 1\ninterrupt = "0x40"'), "and interrupt"),
        (MINIMAL.replace(b'symbol = "f"', b'symbol = "f"\nnth = 0'), "nth"),
        (MINIMAL.replace(b"[start]", b"[start]\nwhen = 1"), "when"),
        (MINIMAL.replace(b'"f"', b"7"), "start.symbol"),
        (MINIMAL.replace(b"[[inject]]", b"[inject]"), "inject"),
        (MINIMAL + b"[[inject]]\nevent = 'nmi'\n", "nmi is injected twice"),
        (MINIMAL + b"then = ['mce', 'mce']\n", "mce inside nmi is injected twice"),
        (b"name = 'x'\n" + MINIMAL, "drop `name`"),
        (b"title = ", "not valid TOML"),
        (b"\xff\xfe", "not UTF-8"),
        (MINIMAL.replace(b'"f"', b'"f"\nnth = ' + b"9" * 5000), "not valid TOML"),
        (b"a=" + b"[" * 3000 + b"]" * 3000, "bad.toml"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(text, says):
    with pytest.raises(BadInputFileError, match=r"bad\.toml") as error:
        scenario.parse(text, "bad.toml", "bad")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@given(st.binary(max_size=300) | st.binary(max_size=60).map(lambda b: MINIMAL + b))
def test_any_bytes_either_load_or_are_refused(data):
    with contextlib.suppress(BadInputFileError):
        scenario.parse(data, "x.toml", "x")


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(UsageError, match="syscall-gap"):
        scenario.load("syscal-gap")


def test_a_file_that_is_too_large_or_a_fifo_is_refused(tmp_path):
    path = tmp_path / "big.toml"
    path.write_bytes(b"#" * 70000)
    with pytest.raises(BadInputFileError, match="larger than 64 KiB"):
        scenario.load(str(path))
    os.mkfifo(tmp_path / "fifo.toml")
    with pytest.raises(BadInputFileError, match="is not a regular file"):
        scenario.load(str(tmp_path / "fifo.toml"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInputFileError, match="no such file"):
        scenario.load(str(tmp_path / "none.toml"))
