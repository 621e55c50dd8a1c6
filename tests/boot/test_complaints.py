"""Complaints are counted by kind, an oops once however many lines tell of it."""

from trapline.boot.complaints import Complaints
from trapline.results.boot import COMPLAINT_KINDS

OOPS = b"Oops: %s: %04lx [#%d]%s"
PAGE_FAULT = b"BUG: unable to handle page fault for address: %px"
BUG = b"kernel BUG at %s:%u!"
WARN = b"WARNING: %s:%d at %pS, CPU#%d: %s/%d"


def of(*messages):
    clock = iter(range(1000))
    taken = []
    complaints = Complaints(lambda: next(clock), lambda text, kind: taken.append((kind, text)))
    for message in messages:
        complaints.message(message, 1, message.decode)
    return complaints, taken


def counts(*messages):
    complaints, _ = of(*messages)
    return {one.kind: one.count for one in complaints.result(COMPLAINT_KINDS)}


def test_an_oops_is_counted_once():
    assert counts(OOPS) == {"oops": 1}
    assert counts(PAGE_FAULT, b"#PF: %s %s in %s mode", OOPS) == {"oops": 1}
    assert counts(PAGE_FAULT, OOPS, OOPS) == {"oops": 2}


def test_a_bug_stays_a_bug_when_it_oopses():
    assert counts(BUG, OOPS) == {"bug": 1}
    assert counts(BUG, OOPS, OOPS, BUG, OOPS) == {"bug": 2, "oops": 1}


def test_the_state_is_taken_down_at_the_first_of_each_kind():
    complaints, taken = of(WARN, OOPS, WARN, b"innocent", OOPS)
    assert [kind for kind, _ in taken] == ["warning", "oops"]
    first, second = complaints.result(COMPLAINT_KINDS)
    assert (first.kind, first.count, first.seconds) == ("warning", 2, 0)
    assert second.text == OOPS.decode()


def test_only_what_is_not_put_up_with_fails():
    complaints, _ = of(WARN, OOPS)
    assert [one.fails for one in complaints.result(frozenset({"oops"}))] == [False, True]
    assert not any(one.fails for one in complaints.result(frozenset()))
