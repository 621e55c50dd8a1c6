from scan_documents import clean, document, driver, mapping, site
from trapline.allowlist.listfile import load
from trapline.devicefilter.check import check
from trapline.report.findings import findings, is_refused, outsiders


def test_refused_sites_and_foreign_drivers_are_findings():
    found = findings(document())
    assert [s.trap for s in found.refused] == ["wbinvd"]
    assert [d.name for d in found.not_allowed] == ["8250"]
    assert found


def test_the_mended_twin_has_none():
    assert not findings(clean())


def foreign(*drivers, mappings=()):
    result = document(sites=(), drivers=drivers, mappings=mappings)
    return [d.name for d in findings(result).not_allowed]


def test_a_module_that_is_not_allowed_is_no_finding():
    assert foreign(driver(allowed=False, builtin=True, sites=1))
    assert not foreign(driver(allowed=False, builtin=False, sites=1))


def test_a_driver_that_touches_nothing_is_no_finding():
    idle = driver(allowed=False, builtin=True, sites=0)
    assert not foreign(idle)
    assert foreign(driver(allowed=False, builtin=True, sites=2))
    assert foreign(idle, mappings=(mapping(driver="virtio_net"),))


def test_a_library_that_binds_to_nothing_is_no_finding():
    library = driver(name="cfbfillrect", allowed=False, builtin=True, sites=9, bus="")
    assert not foreign(library)
    assert outsiders(document(sites=(), drivers=(library,))) == (library,)


def test_findings_are_those_of_the_filter():
    whole = document()
    names = tuple(d.name for d in findings(whole).not_allowed)
    assert check(whole, load()).findings == names == ("8250",)


def test_what_serves_an_allowed_driver_is_no_finding():
    ring = driver(name="virtio_ring", allowed=False, builtin=True, sites=1)
    assert not foreign(driver(allowed=True, reaches=("virtio_ring",)), ring)
    assert foreign(driver(allowed=False, reaches=("virtio_ring",)), ring) == ["virtio_ring"]


def test_refused_is_what_the_handler_cannot_emulate():
    assert is_refused(site(emulable=False))
    assert not is_refused(site(emulable=True))
