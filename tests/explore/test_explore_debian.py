"""Campaigns on Debian's kernel: clean by the rules, the same whoever runs them, and exact."""

import pytest

from trapline.boot.plan import BootOptions, make_plan
from trapline.explore import campaign, scenario
from trapline.explore.campaign import Ledger, LocalWorkers
from trapline.explore.course import Run
from trapline.explore.inject import Injector
from trapline.explore.stage import StageConfig
from trapline.explore.store import Store
from trapline.explore.triggers import Triggers
from trapline.explore.window import LiveWindow
from trapline.guest.target import Target, TargetSource

pytestmark = [pytest.mark.kernel, pytest.mark.xdist_group("debian-explore")]

NAMES = ("syscall-gap", "nmi-in-ve", "irq-in-ve", "swapgs-gap", "iret-gap")


@pytest.fixture(scope="module")
def source(debian_kernel):
    return TargetSource(
        kernel="debian",
        vmlinux=debian_kernel.vmlinux,
        initrd=make_plan(debian_kernel, BootOptions()).initrd,
        release=debian_kernel.release,
    )


def explore(source, path, *, workers, limit, names=NAMES, resume=False, beyond=False):
    scenarios = tuple(scenario.load(name) for name in names)
    config = StageConfig(source, scenarios, names, beyond_rules=beyond)
    steps = []
    with Store.open(path, campaign.identity(config, "id"), resume=resume) as store:
        ledger = Ledger(store, config, lambda done, total: steps.append((done, total)), limit)
        LocalWorkers(config, workers, ledger).run()
        return campaign.result_of(store, config, "id"), steps[-1][1]


@pytest.fixture(scope="module")
def small(source, tmp_path_factory):
    """The path and the result of a small campaign by one worker."""
    path = tmp_path_factory.mktemp("store") / "campaign.db"
    result, _ = explore(source, path, workers=1, limit=12)
    return path, result


def test_by_the_rules_debians_kernel_survives(small):
    _, result = small
    wrong = [(r.scenario, r.event, r.boundary, r.verdict, r.detail) for r in result.results
             if r.verdict not in ("same", "handled", "held")]  # fmt: skip
    assert wrong == []
    assert {r.scenario for r in result.results} == set(NAMES)
    # NMIs before VEINFO.GET are held by the module, and none is lost.
    held = [r for r in result.results if r.rule == "nmi-held"]
    assert held
    assert {r.verdict for r in held} == {"held"}


def test_two_workers_find_what_one_finds(source, small, tmp_path):
    result, _ = explore(source, tmp_path / "two.db", workers=2, limit=12)
    assert result == small[1]


def test_a_finished_campaign_has_nothing_to_resume(source, small):
    path, before = small
    result, tasks = explore(source, path, workers=1, limit=12, resume=True)
    assert result == before
    assert tasks == 0


def test_beyond_the_rules_a_ve_in_the_syscall_gap_is_found(source, tmp_path):
    result, _ = explore(
        source, tmp_path / "gap.db", workers=1, limit=107, names=("syscall-gap",), beyond=True
    )
    window = result.windows[0]
    gap = [r for r in result.results if r.event == "ve:wrmsr" and r.nested is None]
    first = next(r for r in gap if r.boundary == 0)
    assert window.boundaries[0].function == "entry_SYSCALL_64"
    assert first.verdict == "privilege"
    assert first.splat is not None
    # Once the kernel is on its own stack, the handler comes back.
    assert {r.verdict for r in gap if 100 < r.boundary < 200} == {"same"}


def test_the_reference_repeats_and_the_boot_goes_on_as_if_nothing_had_been(source):
    target = Target(source)
    machine = target.machine("")
    scenarios = [scenario.load("nmi-in-ve"), scenario.load("syscall-gap")]
    triggers = Triggers(machine, target, scenarios)
    while (opening := triggers.next()) is not None:
        window = LiveWindow(machine, target, opening)
        injector = Injector(window, "trapline explore debian")
        end, kept = window.end, window.ends.take([])
        for count in range(1000):
            if count % 10 == 0:
                injector.run(Run("nmi", count * 7 % len(window.steps)))
            assert injector.reference() == end
            again = window.ends.take(window.pages_written())
            assert not window.ends.unknown(again)
            assert (window.ends.take([]).words == kept.words).all()
        injector.close()
        window.leave()
    assert triggers.missing == ()
    machine.vcpu.run(machine.module.on_exit)
    explored = machine.host.outcome, machine.ram_digest()
    machine.close()
    straight = target.machine("")
    outcome = straight.run()
    assert explored == (outcome, straight.ram_digest())
    straight.close()
    target.binary.close()
