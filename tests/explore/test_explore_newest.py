"""On a kernel that nothing here was made with: the newest for Debian's stable release."""

import subprocess
from pathlib import Path

import pytest

import trapline
from trapline.results.explore import CLEAN

# The group of the other campaigns: each of them takes a processor for itself.
pytestmark = [pytest.mark.kernel, pytest.mark.xdist_group("debian-explore")]

FETCH = Path(__file__).parents[2] / "tools" / "fetch-kernel"
SCENARIOS = ("syscall-gap", "irq-in-ve", "swapgs-gap")


@pytest.fixture(scope="module")
def newest():
    """The folder of Debian's newest cloud kernel, with its debug package: 350 MB, once."""
    done = subprocess.run(
        [FETCH, "trixie-backports", "linux-image-cloud-amd64"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no kernel of trixie-backports: {done.stderr.strip()[-200:]}")
    return Path(done.stdout.strip())


def test_by_the_rules_nothing_goes_wrong_at_any_instruction(newest):
    result = trapline.explore(newest, scenarios=SCENARIOS, workers=1)
    wrong = [
        (one.scenario, one.event, one.boundary, one.verdict, one.detail)
        for one in result.results
        if one.verdict not in CLEAN
    ]
    assert wrong == []
    assert {one.scenario for one in result.results} == set(SCENARIOS)
    # Its IDT leads to what its names say, and FRED's entry code is not what was tried.
    footprints = {one.event for one in result.footprints}
    assert footprints == {"nmi", "irq:timer"}
    untried = {one.event for window in result.windows for one in window.not_tried}
    assert untried == {"FRED"}
