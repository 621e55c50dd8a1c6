"""The scan against an independent walk of all debugging information entries."""

import dataclasses

import pytest

import diewalk
import tiny_kernel
from trapline.devicefilter.listfile import load
from trapline.kernel.files import KernelFiles
from trapline.scan.engine import scan

# Folders of modules with many MMIO sites, and few enough to walk in a test.
_FOLDERS = ("kernel/drivers/net/ethernet/intel/", "kernel/drivers/gpu/", "kernel/drivers/virtio/")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_kernel.build_vmlinux(tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="module")
def tiny_places(tiny):
    result = scan(KernelFiles("6.12.0", tiny, None), load(), workers=1)
    return diewalk.scanned_places(result.sites, "vmlinux")


def test_both_ways_agree_on_a_tiny_kernel(tiny, tiny_places):
    walked = diewalk.find(tiny)
    assert len(walked) >= 5
    assert diewalk.compare(walked, tiny_places) == ((), ())


def test_a_site_that_the_scan_lost_is_missing(tiny, tiny_places):
    walked = diewalk.find(tiny)
    missing, extra = diewalk.compare(walked, tiny_places[1:])
    assert [item.address for item in missing] == [tiny_places[0][1]]
    assert extra == ()


def test_a_site_that_the_scan_made_up_is_extra(tiny, tiny_places):
    made_up = (".text", tiny_places[0][1] + 1)
    missing, extra = diewalk.compare(diewalk.find(tiny), [*tiny_places, made_up])
    assert missing == ()
    assert extra == (made_up,)


@pytest.mark.kernel
def test_both_ways_agree_on_a_real_kernel(debian_kernel):
    modules = tuple(
        module
        for module in debian_kernel.modules
        if module.debug is not None and module.location.startswith(_FOLDERS)
    )
    result = scan(dataclasses.replace(debian_kernel, modules=modules), load())
    objects = [("vmlinux", debian_kernel.vmlinux)]
    objects += [(module.name, module.debug) for module in modules]
    found = 0
    for name, path in objects:
        walked = diewalk.find(path)
        places = diewalk.scanned_places(result.sites, name)
        assert diewalk.compare(walked, places) == ((), ()), name
        found += len(places)
    assert found > 800
