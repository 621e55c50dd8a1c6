import msgspec
import pytest

import golden_documents as golden
from scan_documents import clean, document, driver, mapping, site
from trapline.allowlist.listfile import load
from trapline.base.errors import ExitCode
from trapline.devicefilter.check import check
from trapline.report.records import RECORDS
from trapline.results.explore import ExploreResult
from trapline.results.findings import exit_code, findings, outsiders


def kinds(result, kind):
    return [found.subject for found in findings(result) if found.kind == kind]


def test_refused_sites_and_foreign_drivers_are_findings():
    assert [s.trap for s in kinds(document(), "refused-site")] == ["wbinvd"]
    assert [d.name for d in kinds(document(), "driver-not-allowed")] == ["8250"]


def test_the_mended_twin_has_none():
    assert not findings(clean())


def foreign(*drivers, mappings=()):
    result = document(sites=(), drivers=drivers, mappings=mappings)
    return [d.name for d in kinds(result, "driver-not-allowed")]


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
    whole, held = document(), check(document(), load())
    ids = [found.id for found in findings(whole) if found.kind == "driver-not-allowed"]
    assert [found.id for found in findings(held)] == ids == ["driver:platform:8250"]
    assert held.findings == ("8250",)


def test_what_serves_an_allowed_driver_is_no_finding():
    ring = driver(name="virtio_ring", allowed=False, builtin=True, sites=1)
    assert not foreign(driver(allowed=True, reaches=("virtio_ring",)), ring)
    assert foreign(driver(allowed=False, reaches=("virtio_ring",)), ring) == ["virtio_ring"]


def test_refused_is_what_the_handler_cannot_emulate():
    assert kinds(document(sites=(site(emulable=False),)), "refused-site")
    assert not kinds(document(sites=(site(emulable=True),)), "refused-site")


# All documents.


@pytest.mark.parametrize(
    ("bad", "sound"),
    [
        (document(), clean()),
        (golden.filtered(), msgspec.structs.replace(golden.filtered(), drivers=())),
        (golden.live(), msgspec.structs.replace(golden.live(), checks=golden.live().checks[::2])),
        (golden.boot_with_devices(), golden.boot()),
        (golden.explore(), golden.explore([golden.run(0, "held")])),
        (golden.verify(), golden.verify(findings=())),
        (golden.contexts(), golden.contexts(answer="", edge="")),
        (golden.tradeoff(), golden.tradeoff(designs=golden.tradeoff().designs[:2])),
        (golden.compared(), golden.compared(same=True)),
        (golden.linted("no id"), golden.linted()),
    ],
)
def test_a_finding_makes_a_command_exit_with_1_and_its_absence_with_0(bad, sound):
    assert any(found.level == "error" for found in findings(bad))
    assert exit_code(bad) == ExitCode.FINDINGS
    assert not any(found.level == "error" for found in findings(sound))
    assert exit_code(sound) == ExitCode.CLEAN


@pytest.mark.parametrize("make", [make for name, (make, _) in golden.GOLDEN.items()])
def test_ids_are_unique_and_have_no_address(make):
    result = make()
    if type(result) not in {record.document for record in RECORDS}:
        return
    ids = [found.id for found in findings(result)]
    assert len(set(ids)) == len(ids)
    assert not any("+0x" in each or "ffffffff" in each for each in ids)


def test_what_has_no_findings_is_no_result():
    with pytest.raises(TypeError, match="AllowList is no result"):
        findings(load())


def test_a_guest_that_died_says_how_by_its_exit_code():
    assert exit_code(golden.boot_panic()) == ExitCode.GUEST_PANIC
    dead = msgspec.structs.replace(golden.boot_with_devices(), outcome=golden.boot_panic().outcome)
    assert exit_code(dead) == ExitCode.GUEST_PANIC


def test_a_note_is_no_error():
    result = golden.live()
    assert [found.level for found in findings(result)] == ["error", "note"]


def test_runs_that_differ_by_where_the_second_event_came_are_told_apart():
    runs = [golden.run(1, "privilege", nested="nmi", at=at) for at in (3, 9)]
    ids = [found.id for found in findings(golden.explore(runs))]
    assert ids == ["gap/nmi+nmi/entry:mov %rsp,@#0", "gap/nmi+nmi/entry:mov %rsp,@#0/2"]


# A baseline.


def test_with_a_baseline_only_what_became_worse_is_an_error():
    found = findings(golden.explore_baseline())
    assert [(each.level, each.id) for each in found] == [
        ("error", "iret/lost"),
        ("note", "gap/nmi/entry:mov %rsp,@#0"),
        ("error", "gap/nmi/work:nop#0"),
    ]


def test_with_a_baseline_that_is_as_bad_nothing_is_an_error():
    result = golden.explore([golden.run(1, "privilege")], ())
    assert [each.level for each in findings(result)] == ["note"]
    assert exit_code(result) == ExitCode.CLEAN


def test_whatever_a_baseline_lists_is_an_error():
    result = golden.explore([golden.run(0, "same")], ("gap nmi gone+0x9 (nop): same, now hang",))
    assert isinstance(findings(result)[0].subject, ExploreResult)
    assert exit_code(result) == ExitCode.FINDINGS
