from scan_documents import clean, document, driver, site
from trapline.report.findings import findings, is_refused


def test_refused_sites_and_foreign_drivers_are_findings():
    found = findings(document())
    assert [s.trap for s in found.refused] == ["wbinvd"]
    assert [d.name for d in found.not_allowed] == ["8250"]
    assert found


def test_the_mended_twin_has_none():
    assert not findings(clean())


def foreign(*drivers):
    return [d.name for d in findings(document(sites=(), drivers=drivers)).not_allowed]


def test_a_module_that_is_not_allowed_is_no_finding():
    assert foreign(driver(allowed=False, builtin=True, sites=1))
    assert not foreign(driver(allowed=False, builtin=False, sites=1))


def test_a_driver_that_touches_nothing_is_no_finding():
    assert foreign(driver(allowed=False, builtin=True, sites=0, calls=2))
    assert not foreign(driver(allowed=False, builtin=True, sites=0, calls=0))


def test_what_serves_an_allowed_driver_is_no_finding():
    ring = driver(name="virtio_ring", allowed=False, builtin=True, sites=1)
    assert not foreign(driver(allowed=True, reaches=("virtio_ring",)), ring)
    assert foreign(driver(allowed=False, reaches=("virtio_ring",)), ring) == ["virtio_ring"]


def test_refused_is_what_the_handler_cannot_emulate():
    assert is_refused(site(emulable=False))
    assert not is_refused(site(emulable=True))
