"""Windows of each way into the kernel, and of traps of user mode."""

import pytest
from test_campaign import config, parse
from test_campaign import explore as campaign

from guests import SYSCALL, TRAP, Opened, explore, source
from trapline.base.errors import UsageError
from trapline.explore import scenario
from trapline.explore.gates import ways_in
from trapline.explore.stage import StageConfig
from trapline.results.explore import CLEAN

EACH = """
title = "each"
[start]
interrupt = "each"
nth = 3
[[inject]]
event = "nmi"
"""
BY_USER = TRAP.replace("nth = 2", "nth = 2\nuser = true") + '[[inject]]\nevent = "nmi"\n'


def test_ways_in_are_told_by_what_is_behind_their_stubs():
    with Opened(TRAP, "TRAP", "MORE_VECTORS", "STUCK_VECTOR") as guest:
        assert ways_in(guest.machine.vcpu) == (0x40, 0x50, 0x60)
    with Opened(TRAP, "TRAP") as guest:
        assert ways_in(guest.machine.vcpu) == (0x40,)


def test_each_way_in_is_a_window_of_its_own():
    result = campaign(config("MORE_VECTORS", "STUCK_VECTOR", text=EACH, beyond=False))
    assert [one.scenario for one in result.windows] == ["one:0x40", "one:0x50"]
    assert [(one.scenario, one.why) for one in result.not_opened] == [
        ("one:0x60", "the handler of this vector does not come back")
    ]
    assert {one.verdict for one in result.results} <= CLEAN
    # Not before the interrupt: that is what the others are compared with.
    assert min(one.boundary for one in result.results) == 1
    commands = {one.scenario: one.reproduce for one in result.results}
    assert "--scenario one.toml:0x50 --event nmi --at" in commands["one:0x50"]


def test_a_handler_that_traps_and_does_not_come_back():
    """Nothing of its run is left when the guest goes on to the windows behind."""
    flags = ("TRAP", "MORE_VECTORS", "STUCK_VECTOR", "STUCK_TRAPS")
    later = parse(SYSCALL.replace("nth = 4", "nth = 8"), "later")
    scenarios = (parse(EACH, "each"), later)
    result = campaign(StageConfig(source(*flags), scenarios, ("each.toml", "later.toml")))
    assert [one.scenario for one in result.not_opened] == ["each:0x60"]
    assert [one.scenario for one in result.windows] == ["each:0x40", "each:0x50", "later"]
    assert {one.verdict for one in result.results} <= CLEAN


def test_an_nmi_that_a_kernel_does_not_survive_in_its_handler():
    flags = ("MORE_VECTORS", "NMI_PANICS")
    result = campaign(config(*flags, text=EACH, beyond=False))
    assert {one.verdict for one in result.results} <= CLEAN
    result = campaign(config(*flags, "BUSY_IN_IRQ", text=EACH, beyond=False))
    bad = [one for one in result.results if one.verdict not in CLEAN]
    assert {one.verdict for one in bad} == {"panic"}
    assert {one.scenario for one in bad} == {"one:0x40", "one:0x50"}


def test_each_way_in_from_the_kernel():
    text = EACH.replace("nth = 3", 'symbol = "work"\nnth = 3')
    result = campaign(config("WORKS", "MORE_VECTORS", text=text, beyond=False))
    assert [one.scenario for one in result.windows] == ["one:0x40", "one:0x50"]
    for window in result.windows:
        first, *handler, _ = (one.function for one in window.boundaries)
        assert first == "work"
        assert "work" not in handler
    assert {one.verdict for one in result.results} <= CLEAN
    flags = ("WORKS", "MORE_VECTORS", "NMI_PANICS", "BUSY_IN_IRQ")
    result = campaign(config(*flags, text=text, beyond=False))
    assert {one.verdict for one in result.results if one.verdict not in CLEAN} == {"panic"}


@pytest.mark.parametrize("start", ["nth = 3", 'symbol = "work"\nnth = 3'])
def test_only_entry_and_exit_code_is_tried(start):
    text = EACH.replace("nth = 3", start) + 'where = "entry"\n'
    result = campaign(config("WORKS", "IRQ_IN_C", "ENTRY_TEXT", text=text, beyond=False))
    (window,) = result.windows
    names = {one.index: one.function for one in window.boundaries}
    handlers = [index for index, name in names.items() if name in ("planted", "sysvec_planted")]
    tried = [one.boundary for one in result.results]
    assert tried == [*range(1, handlers[0]), *range(handlers[-1] + 1, len(names))]
    assert {names[boundary] for boundary in tried} == {"asm_planted"}
    assert {one.verdict for one in result.results} <= CLEAN


def test_one_of_them_by_name(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(EACH)
    one = scenario.load(f"{path}:0x50")
    assert (one.name, one.start.interrupt, one.title) == ("mine:0x50", "0x50", "each: 0x50")
    path.write_text(TRAP)
    with pytest.raises(UsageError, match="is not one for each vector"):
        scenario.load(f"{path}:0x50")


def test_traps_of_user_mode():
    with Opened(BY_USER, "TRAP", "USER_TRAPS") as guest:
        assert guest.window.last_step.cpl == 3
        assert {one.verdict for one in guest.all("nmi")} <= CLEAN
    with pytest.raises(AssertionError), Opened(BY_USER, "TRAP"):
        pass  # there are none
    of_kernel = BY_USER.replace("user = true", "user = false")
    with Opened(of_kernel, "TRAP", "USER_TRAPS") as guest:
        assert guest.window.last_step.cpl == 0
    assert set(explore(BY_USER, "irq:0x40", "USER_TRAPS")) <= CLEAN
