"""The gaps of Debian's kernel: proved, and held against what `explore` finds by trying."""

import pytest

import trapline
from trapline.results.contexts import UNREAD_EDGES
from trapline.results.explore import CLEAN
from trapline.results.findings import findings

pytestmark = [pytest.mark.kernel, pytest.mark.xdist_group("debian-explore")]


@pytest.fixture(scope="module")
def document(debian_kernel):
    return trapline.contexts(trapline.open_kernel(debian_kernel.vmlinux))


def test_no_site_may_trap_in_any_gap(document):
    assert "gap-site" not in {found.kind for found in findings(document)}
    assert document.missing == ()
    found = {gap.id for gap in document.gaps}
    assert {"syscall", "exceptions", "interrupts", "ve", "ve-early", "nmi", "mc", "db"} <= found
    for gap in document.gaps:
        assert not [site for site in gap.sites if site.answer != "no"]
        assert not [edge for edge in gap.edges if edge.kind in UNREAD_EDGES]


def test_the_gaps_are_as_small_as_entry_code_is(document):
    by_id = {gap.id: gap for gap in document.gaps}
    assert 20 < len(by_id["syscall"].instructions) < 120
    # Nothing of a handler: code of C in them is what sets up the state, and gets VE_INFO.
    assert all(len(gap.instructions) < 600 for gap in document.gaps)


@pytest.mark.parametrize("scenario", ["syscall-gap", "swapgs-gap"])
def test_what_a_run_finds_unsafe_lies_in_a_gap(debian_kernel, document, scenario):
    kernel = trapline.open_kernel(debian_kernel.vmlinux)
    tried = trapline.explore(
        kernel, scenarios=scenario, beyond_rules=True, event="ve:wrmsr", workers=1
    )
    (window,) = tried.windows
    unsafe = {
        (window.boundaries[run.boundary].function, window.boundaries[run.boundary].offset)
        for run in tried.results
        if run.verdict not in CLEAN
    }
    covered = {
        (each.place.function, each.place.offset)
        for gap in document.gaps
        for each in gap.instructions
    }
    assert unsafe, "beyond the rules a #VE in the gap does harm"
    assert unsafe <= covered
