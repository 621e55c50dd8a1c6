"""Campaigns on a guest of a hundred instructions: workers, stores, deaths."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest

from guests import SYSCALL, build, source
from reports import text
from trapline.base.errors import BadInputFileError, WorkersLostError
from trapline.explore import baseline, campaign, scenario
from trapline.explore.campaign import Ledger, LocalWorkers
from trapline.explore.stage import Exactly, StageConfig
from trapline.explore.store import Store
from trapline.results.explore import CLEAN

BOTH = SYSCALL + '[[inject]]\nevent = "ve:wrmsr"\n'
NESTED = BOTH + '[[inject]]\nevent = "nmi"\nthen = ["ve:wrmsr"]\nstride = 7\n'


def silent(*_):
    pass


def parse(text, name="one"):
    return scenario.parse(text.encode(), f"{name}.toml", name)


def config(*flags, text=BOTH, beyond=True, exactly=None):
    return StageConfig(
        source(*flags), (parse(text),), ("one.toml",), beyond_rules=beyond, exactly=exactly
    )


def explore(config, *, workers=1, path=None, resume=False, limit=None, chunk=4, progress=None):
    """Run a campaign; returns its result document."""
    progress = progress or silent
    with Store.open(path, campaign.identity(config, "id"), resume=resume) as store:
        ledger = Ledger(store, config, progress, limit, chunk)
        not_opened = LocalWorkers(config, workers, ledger).run()
        return campaign.result_of(store, config, "id", not_opened)


def test_a_campaign_injects_at_every_boundary():
    result = explore(config())
    (window,) = result.windows
    assert result.injected == len(result.results) == 2 * window.instructions
    count = window.instructions
    assert result.counts["one"] == {"handled": count, "privilege": 5, "same": count - 5}
    (footprint,) = result.footprints
    assert (footprint.event, footprint.basis, footprint.runs) == ("nmi", "ordinary", count)
    assert footprint.boundaries == ((0, count - 1),)
    assert [(w.name, w.was, w.now) for w in footprint.words] == [("nmi_count", 0, 1)]
    assert {r.boundary for r in result.results} == set(range(window.instructions))
    assert not window.forbidden


def test_a_guest_that_dies_in_a_window_is_a_finding_and_the_rest_goes_on():
    """What opens before, and what has a boot of its own, is tried."""
    before = parse(SYSCALL.replace("nth = 4", "nth = 2"), "before")
    dies = parse(SYSCALL, "dies")
    after = parse(SYSCALL.replace("nth = 4", "nth = 5"), "after")
    own = parse(
        SYSCALL.replace("nth = 4", "nth = 3").replace("[start]", 'append = "x"\n[start]'), "own"
    )
    scenarios = (before, dies, after, own)
    names = tuple(f"{each.name}.toml" for each in scenarios)
    flags = ("DIES_IN_FOURTH_CALL", "LOSES_STACK")
    result = explore(StageConfig(source(*flags), scenarios, names, is_all_shipped=True), workers=2)
    assert result.counts["dies"] == {"double-fault": 1}
    assert [one.scenario for one in result.not_opened] == ["after"]
    for name in ("before", "own"):
        assert set(result.counts[name]) <= CLEAN
    # The window is as long as the guest has lived.
    window = next(one for one in result.windows if one.scenario == "dies")
    assert window.instructions == len(window.boundaries)
    assert window.boundaries[-1].instruction == "ud2"
    (failure,) = (one for one in result.results if one.scenario == "dies")
    assert failure.boundary == window.boundaries[-1].index


def test_two_workers_find_what_one_finds():
    assert explore(config(text=NESTED), workers=2) == explore(config(text=NESTED), workers=1)


def test_by_the_rules_no_ve_comes_where_nothing_traps():
    result = explore(config(beyond=False))
    (window,) = result.windows
    assert {r.event for r in result.results} == {"nmi"}
    (part,) = window.forbidden
    assert (part.event, part.rule) == ("ve:wrmsr", "private-mapped")
    assert part.boundaries == window.instructions


def test_a_window_that_goes_wrong_by_itself_is_a_finding_and_the_rest_goes_on(tmp_path):
    path = tmp_path / "a.db"
    later = SYSCALL.replace("syscall = 39", 'symbol = "do_syscall_64"').replace(
        "nth = 4", "nth = 5"
    )
    settings = StageConfig(
        source("GAP_TRAPS"), (parse(BOTH), parse(later, "two")), ("a", "b"), beyond_rules=False
    )
    for resume in (False, True):
        result = explore(settings, workers=2, path=path, resume=resume)
        first, *rest = result.results
        assert (first.scenario, first.event, first.verdict) == ("one", "nothing", "privilege")
        window = result.windows[0]
        assert window.boundaries[first.boundary].instruction == "cpuid"
        assert {one.scenario for one in rest} == {"two"}
        assert {one.verdict for one in rest} <= CLEAN
        assert result.injected == len(rest) == result.windows[1].instructions


ONLY_NESTED = SYSCALL + 'then = ["irq:0x40", "ve:wrmsr"]\nstride = 7\n'


def test_an_event_that_leaves_nothing_to_nest_into_is_reported():
    """By itself the NMI ends in a panic, so that there is no handling to nest into."""
    result = explore(config("NMI_PANICS", text=ONLY_NESTED))
    found = [(r.boundary, r.detail) for r in result.results if r.nested is None]
    plain = explore(config("NMI_PANICS", text=SYSCALL)).results
    assert found == [(r.boundary, r.detail) for r in plain if r.verdict == "panic"]
    assert len(found) == 2
    both = explore(config("NMI_PANICS", text=f'{ONLY_NESTED}[[inject]]\nevent = "nmi"\n'))
    assert sum(r.nested is None for r in both.results) == both.windows[0].instructions


def test_the_rules_forbid_one_nested_event_and_not_the_other():
    result = explore(config(text=ONLY_NESTED, beyond=False))
    (window,) = result.windows
    assert {r.nested for r in result.results} == {"irq:0x40"}
    assert {r.boundary for r in result.results} == set(range(window.instructions))
    (part,) = window.forbidden
    assert (part.event, part.boundaries) == ("nmi,ve:wrmsr", window.instructions)


def test_a_limit_spreads_the_boundaries_evenly():
    result = explore(config(text=SYSCALL), limit=4)
    count = result.windows[0].instructions
    assert [r.boundary for r in result.results] == [i * count // 4 for i in range(4)]


def test_progress_ends_with_all_done():
    seen = []
    explore(config(), progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)


def test_a_run_is_reproduced_by_its_number():
    worst = next(r for r in explore(config()).results if r.verdict == "privilege")
    text = SYSCALL.replace("nmi", worst.event)
    again = explore(config(text=text, beyond=False, exactly=Exactly(worst.boundary)))
    assert again.results == (worst,)


def test_a_boundary_that_is_not_there_is_refused():
    with pytest.raises(BadInputFileError, match=r"numbered from 0; there is no 999\."):
        explore(config(text=SYSCALL, exactly=Exactly(999)))


def test_a_nested_event_behind_the_handling_is_refused():
    text = SYSCALL + 'then = ["ve:wrmsr"]\n'
    with pytest.raises(BadInputFileError, match=r"ve:wrmsr cannot come 99,999 behind it\."):
        explore(config(text=text, exactly=Exactly(3, 99_999)))


def test_a_scenario_that_never_begins_is_told_at_the_end():
    never = SYSCALL.replace("nth = 4", "nth = 4000")
    settings = StageConfig(
        source(), (parse(SYSCALL), parse(never, "two")), ("a", "b"), beyond_rules=True
    )
    result = explore(settings, workers=2)
    (missed,) = result.not_opened
    assert (missed.scenario, missed.why) == (
        "two",
        "its window did not open before the guest ended",
    )
    assert len(result.results) == result.windows[0].instructions


def test_a_guest_that_dies_before_a_window_opens_is_told_by_what_it_died_of():
    later = SYSCALL.replace("nth = 4", "nth = 6")
    scenarios = (parse(later), parse(later.replace("nth = 6", "nth = 7"), "two"))
    settings = StageConfig(source("DIES_IN_FOURTH_CALL", "LOSES_IDT"), scenarios, ("a", "b"))
    result = explore(settings, workers=2)
    (death,) = result.results
    assert (death.scenario, death.event, death.verdict) == ("one", "nothing", "triple-fault")
    assert death.detail.startswith("The guest dies before the window opens: ")
    assert death.splat is not None
    (missed,) = result.not_opened
    assert missed.why.startswith("the guest died before its window opened: ")
    sound = explore(StageConfig(source(), scenarios, ("a", "b")))
    assert set(sound.counts) == {"one", "two"}
    assert {r.verdict for r in sound.results} <= CLEAN


def test_a_guest_without_a_gate_for_int80_is_not_said_to_be_tried():
    result = explore(config(text=SYSCALL.replace('"nmi"', '"int80"')))
    assert result.results == ()
    (part,) = result.windows[0].not_tried
    assert (part.event, part.why) == ("int80", "the IDT has no gate for vector 0x80")
    assert "NOT TRIED: int80: the IDT has no gate for vector 0x80." in text(result).splitlines()


def test_what_all_scenarios_want_and_this_kernel_lacks_is_told():
    scenarios = (
        parse(SYSCALL),
        parse(SYSCALL.replace("nth = 4", 'nth = 4\nwithin = ["gone", "lost"]'), "two"),
        parse(
            SYSCALL.replace("nth = 4", 'nth = 4\nwithin = ["gone", "entry_SYSCALL_64"]'), "three"
        ),
        parse('append = "x"\n' + SYSCALL.replace("syscall = 39", 'symbol = "gone"'), "four"),
    )
    names = tuple(one.name for one in scenarios)
    result = explore(StageConfig(source(), scenarios, names, is_all_shipped=True))
    assert [(m.scenario, m.why) for m in result.not_opened] == [
        ("four", "this kernel has no symbol 'gone'"),
        ("two", "this kernel has no symbol 'gone'"),
    ]
    assert {window.scenario for window in result.windows} == {"one", "three"}
    assert "NOT TRIED: two: this kernel has no symbol 'gone'." in text(result).splitlines()
    before = baseline.verdicts(result.windows, result.results)
    assert baseline.worse(before, before, result.not_opened) == ()
    gone = tuple(msgspec.structs.replace(m, scenario="one") for m in result.not_opened[:1])
    assert baseline.worse(before, before, gone) == (
        "one: was tried, and now this kernel has no symbol 'gone'",
    )


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("syscall = 39", 'symbol = "no_such_function"', "no symbol 'no_such_function'"),
        ("nth = 4\n", 'nth = 4\nwithin = "gone"\n', "no symbol 'gone'"),
        ("nth = 4\n", 'nth = 4\n[end]\nat = { symbol = "gone" }\n', "no symbol 'gone'"),
        ("nth = 4\n", 'nth = 4\n[end]\nat = { symbol = "entry_SYSCALL_64" }\n', "is empty"),
        ("nth = 4\n", 'nth = 4\n[end]\nat = { symbol = "panic" }\n', "ends with the guest"),
    ],
)
def test_a_scenario_that_this_kernel_cannot_have(old, new, says):
    with pytest.raises(BadInputFileError, match=says):
        explore(config(text=SYSCALL.replace(old, new)))


def test_resume_repeats_nothing_and_loses_nothing(tmp_path):
    path = tmp_path / "a.db"
    whole = explore(config(text=NESTED))
    part = explore(config(text=NESTED), path=path, limit=3)
    assert len(part.results) < len(whole.results)
    steps = []
    again = explore(
        config(text=NESTED), path=path, resume=True, progress=lambda d, t: steps.append((d, t))
    )
    assert again == whole
    # Of three [[inject]]s, three boundaries each were done.
    assert steps[-1][1] == 3 * whole.windows[0].instructions - 9


def test_resume_where_a_nested_event_made_no_sense(tmp_path):
    path = tmp_path / "a.db"
    text = SYSCALL + 'then = ["irq:0x40", "ve:mmio"]\nstride = 9\n'
    explore(config(text=text), path=path, limit=6)
    assert explore(config(text=text), path=path, resume=True) == explore(config(text=text))
    steps = []
    explore(config(text=text), path=path, resume=True, progress=lambda d, t: steps.append((d, t)))
    assert steps == [(0, 0)]


def test_resume_after_kill_9(tmp_path):
    """The parent dies between two transactions; its workers notice and go away."""
    path = tmp_path / "a.db"
    program = textwrap.dedent(f"""
        import os, signal, sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
        import test_campaign as t
        def die(done, total):
            if done >= 12:
                os.kill(os.getpid(), signal.SIGKILL)
        if __name__ == "__main__":
            t.explore(t.config(), path=t.Path({str(path)!r}), workers=2, progress=die)
    """)
    script = tmp_path / "killed.py"
    script.write_text(program)
    paths = (str(Path(build(())).parent), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, script], check=False, env=environment)
    assert done.returncode == -signal.SIGKILL
    steps = []
    result = explore(config(), path=path, resume=True, progress=lambda d, t: steps.append((d, t)))
    assert result == explore(config())
    assert 0 < steps[-1][1] <= len(result.results) - 12


class _Dying(LocalWorkers):
    """Kills all workers while they work, so many times."""

    left = 1

    def answered(self, worker, job, answer):
        super().answered(worker, job, answer)
        if any(self._queues.values()) and self.left:
            self.left -= 1
            for process in multiprocessing.active_children():
                process.kill()
                process.join()


def run_dying(settings, deaths, workers=2):
    with Store.open(None, campaign.identity(settings, "id"), resume=False) as store:
        ledger = Ledger(store, settings, silent, chunk=4)
        pool = _Dying(settings, workers, ledger)
        pool.left = deaths
        pool.run()
        return campaign.result_of(store, settings, "id")


def test_a_dying_worker_is_replaced_and_its_chunk_done_again():
    assert run_dying(config(), 2) == explore(config())


def test_workers_that_always_die_end_the_campaign():
    """One worker: of two, the other may be killed while it boots, and then that is where."""
    with pytest.raises(WorkersLostError, match="keep dying in scenario one"):
        run_dying(config(), 100, workers=1)


def test_ctrl_c_leaves_no_worker_behind(tmp_path):
    class Watched(LocalWorkers):
        def answered(self, worker, job, answer):
            super().answered(worker, job, answer)
            raise KeyboardInterrupt

    before = set(multiprocessing.active_children())
    settings = config()
    with Store.open(tmp_path / "a.db", campaign.identity(settings, "id"), resume=False) as store:
        ledger = Ledger(store, settings, silent)
        with pytest.raises(KeyboardInterrupt):
            Watched(settings, 2, ledger).run()
    assert set(multiprocessing.active_children()) == before


def test_a_store_belongs_to_what_was_run(tmp_path):
    path = tmp_path / "a.db"
    explore(config(), path=path, limit=1)
    with pytest.raises(BadInputFileError, match="belongs to another campaign, its options"):
        explore(config(text=NESTED), path=path, resume=True)


def test_a_baseline_shows_what_a_change_made_worse(tmp_path):
    before, path = explore(config("VE_ON_IST")), tmp_path / "before.db"
    explore(config("VE_ON_IST"), path=path)
    now = explore(config())
    old = baseline.verdicts(*baseline.load(path))
    assert old == baseline.verdicts(before.windows, before.results)
    worse = baseline.worse(old, baseline.verdicts(now.windows, now.results))
    assert len(worse) == 5
    assert worse[0] == ("one ve:wrmsr entry_SYSCALL_64+0x0 (swapgs): same, now privilege")
    assert baseline.worse(old, old) == ()
    # And what became better is nothing to report.
    assert baseline.worse(baseline.verdicts(now.windows, now.results), old) == ()


def test_a_baseline_survives_moved_code():
    """The sound guest, with a function before it that moves everything."""
    moved = explore(config("VE_ON_IST", "PADDED"))
    old = explore(config("VE_ON_IST"))
    before = baseline.verdicts(old.windows, old.results)
    assert old.results != moved.results
    assert baseline.worse(before, baseline.verdicts(moved.windows, moved.results)) == ()


def test_what_is_no_baseline(tmp_path):
    for content in (b"", b"{}", b"[" * 5000, b"SQLite format 3\0 and more"):
        path = tmp_path / "bad"
        path.write_bytes(content)
        with pytest.raises(BadInputFileError, match="bad: is"):
            baseline.load(path)
    with pytest.raises(BadInputFileError, match="cannot be read"):
        baseline.load(tmp_path / "gone")
