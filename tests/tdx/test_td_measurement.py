"""MRTD: the blocks that are hashed into it."""

import hashlib

import pytest

from trapline.tdx.measurement import Measurements
from trapline.tdx.vmm_interface import TdConfig


@pytest.fixture
def measurements():
    return Measurements(TdConfig(memory_size=1 << 20))


def test_mrtd_is_the_hash_of_the_calls(measurements):
    chunk = bytes(range(256))
    measurements.page_added(0x1000)
    measurements.extend(0x1100, chunk)
    measurements.finalize()
    expected = hashlib.sha384()
    expected.update(b"MEM.PAGE.ADD".ljust(16, b"\0") + b"\0\x10" + bytes(110))
    expected.update(b"MR.EXTEND".ljust(16, b"\0") + b"\0\x11" + bytes(110))
    expected.update(chunk)
    assert measurements.mrtd == expected.digest()


@pytest.mark.parametrize(("gpa", "size"), [(0x1080, 256), (0x1000, 255)])
def test_extend_measures_aligned_chunks(measurements, gpa, size):
    with pytest.raises(ValueError, match="256 aligned bytes"):
        measurements.extend(gpa, bytes(size))


def test_oversized_identities_do_not_bend_the_layout():
    long = Measurements(TdConfig(memory_size=1 << 20, mr_owner=bytes(100), mr_config_id=b"x"))
    assert len(long.td_info()) == 512
    assert len(long.report(b"y" * 100)) == 1024
