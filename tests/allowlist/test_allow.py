"""Matching of modalias strings, as kmod does with fnmatch()."""

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.allowlist import virtio
from trapline.allowlist.entries import AllowEntry, AllowList, DeviceAlias, parse_id

NET = "pci:v00001AF4d00001041sv00001AF4sd00001100bc02sc00i00"


def allow_list(*ids):
    return AllowList("test", "test", tuple(AllowEntry(i, i, None, parse_id(i)) for i in ids))


@pytest.mark.parametrize(
    ("entry", "modalias", "expected"),
    [
        ("1af4:1041", NET, True),
        ("1af4:1042", NET, False),
        ("8086:1041", NET, False),
        ("1af4:*", NET, True),
        ("8086:*", NET, False),
        ("class:02", NET, True),
        ("class:0200", NET, True),
        ("class:020000", NET, True),
        ("class:0201", NET, False),
        ("class:0c", NET, False),
        ("virtio:1", NET, False),
        ("virtio:1", "virtio:d00000001v00001AF4", True),
        ("virtio:*", "virtio:d00000001v00001AF4", True),
        ("virtio:2", "virtio:d00000001v00001AF4", False),
        ("virtio:26", "virtio:d0000001Av00001AF4", True),
        ("1af4:*", "virtio:d00000001v00001AF4", False),
        ("1af4:1041", "acpi:PNP0501:", False),
        ("1af4:1041", "", False),
    ],
)
def test_devices(entry, modalias, expected):
    allow = allow_list(entry)
    assert (allow.matching(modalias) is not None) is expected


def test_the_first_entry_that_fits_is_named():
    allow = allow_list("class:0c", "1af4:*", "1af4:1041")
    assert allow.matching(NET).id == "1af4:*"


@pytest.mark.parametrize(
    ("entry", "alias", "expected"),
    [
        ("1af4:1041", "pci:v00001AF4d*sv*sd*bc*sc*i*", True),
        ("1af4:1041", "pci:v00001AF4d00001041sv*sd*bc*sc*i*", True),
        ("1af4:1041", "pci:v00001AF4d00001042sv*sd*bc*sc*i*", False),
        ("1af4:1041", "pci:v00008086d*sv*sd*bc*sc*i*", False),
        ("1af4:1041", "pci:v*d*sv*sd*bc01sc08i02*", True),
        ("class:0c03", "pci:v*d*sv*sd*bc01sc08i02*", False),
        ("class:01", "pci:v*d*sv*sd*bc01sc08i02*", True),
        ("virtio:1", "virtio:d00000001v*", True),
        ("virtio:1", "virtio:d00000002v*", False),
        ("1af4:1041", "usb:v1AF4p*d*dc*dsc*dp*ic*isc*ip*in*", False),
        ("1af4:1041", "fs-ext4", False),
    ],
)
def test_drivers(entry, alias, expected):
    assert bool(allow_list(entry).admitting(alias)) is expected


def test_a_trailing_star_stands_for_the_rest():
    assert DeviceAlias.parse("pci:v*") == DeviceAlias.parse("pci:v*d*sv*sd*bc*sc*i*")
    assert DeviceAlias.parse("pci:v00001AF4*") == DeviceAlias.parse("pci:v00001AF4d*sv*")
    assert DeviceAlias.parse("pci:v00001AF4") is None


@pytest.mark.parametrize(
    "text",
    [
        "pci",
        "pci:",
        ":",
        "PCI:v*",
        "pci:v1AF4d*",
        "pci:d*v*",
        "pci:v*x",
        NET + "x",
        "pci:v*" * 2000,
    ],
)
def test_what_is_no_device_alias(text):
    assert DeviceAlias.parse(text) is None


HEX = st.integers(0, 0xFFFF)
FIELD = st.none() | HEX
BYTE = st.none() | st.integers(0, 0xFF)


@st.composite
def pci_aliases(draw, concrete=False):
    word, byte = (HEX, st.integers(0, 0xFF)) if concrete else (FIELD, BYTE)
    names = ("v", "d", "sv", "sd", "bc", "sc", "i")
    kinds = (word, word, word, word, byte, byte, byte)
    return DeviceAlias("pci", tuple((n, draw(k)) for n, k in zip(names, kinds, strict=True)))


def modalias(device):
    return device.pattern().removesuffix("*")


@given(pci_aliases(), pci_aliases(concrete=True))
def test_covers_is_fnmatch(pattern, device):
    assert pattern.covers(device) == fnmatchcase(modalias(device), pattern.pattern())


@given(pci_aliases(concrete=True), st.data())
def test_overlapping_patterns_have_a_device_in_common(device, data):
    def blur():
        kept = data.draw(st.lists(st.booleans(), min_size=7, max_size=7))
        return DeviceAlias(
            "pci",
            tuple((n, v if k else None) for (n, v), k in zip(device.fields, kept, strict=True)),
        )

    assert blur().overlaps(blur())


@given(pci_aliases(), pci_aliases())
def test_overlap_is_what_a_common_device_shows(first, second):
    fields = tuple(
        (name, mine if mine is not None else theirs if theirs is not None else 0)
        for (name, mine), (_, theirs) in zip(first.fields, second.fields, strict=True)
    )
    common = DeviceAlias("pci", fields)
    assert first.overlaps(second) == (first.covers(common) and second.covers(common))


@given(pci_aliases())
def test_patterns_are_read_as_they_are_written(pattern):
    assert DeviceAlias.parse(pattern.pattern()) == pattern


@given(st.text(max_size=60) | st.from_regex(r"(pci|virtio):[vdscbi0-9A-F*]{0,40}"))
def test_any_text_is_parsed_or_not(text):
    alias = DeviceAlias.parse(text)
    if alias is not None:
        assert DeviceAlias.parse(alias.pattern()) == alias


def test_virtio_ids_of_pci_ids():
    assert [virtio.device_type(i) for i in (0x1000, 0x1001, 0x1003, 0x1009)] == [1, 2, 3, 9]
    assert [virtio.device_type(i) for i in (0x1041, 0x1042, 0x1043, 0x1049)] == [1, 2, 3, 9]
    assert virtio.device_type(0x105A) == 26
    assert virtio.device_type(0x1002) == 5
    assert virtio.device_type(0x1006) is None
    assert virtio.device_type(0x1080) is None
    assert virtio.takes_subsystem_id(0x103F)
    assert not virtio.takes_subsystem_id(0x1041)
