"""What a kernel's messages mean: by format string and by line, and what only looks like them."""

import pytest

from trapline.linux.messages import complaint, unprefixed

# Format strings of 6.1, 6.12, 7.2 and 7.3, and what they become.
SAID = [
    ("warning", b"\x014WARNING: CPU: %d PID: %d at %s:%d %pS\n",
     b"[    1.234567] WARNING: CPU: 0 PID: 1 at mm/slub.c:12 kfree+0x1/0x2"),
    ("warning", b"\x014WARNING: %s:%d at %pS, CPU#%d: %s/%d\n",
     b"[    1.234567][    T1] WARNING: mm/slub.c:12 at kfree+0x1/0x2, CPU#0: init/1"),
    ("warning", b"\x014WARNING: suspicious RCU usage\n", b"WARNING: suspicious RCU usage"),
    ("oops", b"Oops: %s: %04lx [#%d]%s%s%s%s%s\n",
     b"[    2.000000] Oops: VE fault: 0000 [#1] PREEMPT SMP NOPTI"),
    ("oops", b"%s: %04lx [#%d]%s%s%s%s%s\n", b"general protection fault: 0000 [#1] PREEMPT SMP"),
    ("oops", b"\x011BUG: unable to handle page fault for address: %px\n",
     b"BUG: unable to handle page fault for address: ffffffffffffffff"),
    ("oops", b"\x010traps: PANIC: double fault, error_code: 0x%lx\n",
     b"traps: PANIC: double fault, error_code: 0x0"),
    ("bug", b"\x012kernel BUG at %s:%u!\n", b"kernel BUG at mm/slub.c:12!"),
    ("bug", b"\x013BUG: scheduling while atomic: %s/%d/0x%08x\n",
     b"BUG: scheduling while atomic: init/1/0x00000002"),
    ("soft-lockup", b"\x010watchdog: BUG: soft lockup - CPU#%d stuck for %us! [%s:%d]\n",
     b"watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [init:1]"),
    ("rcu-stall", b"\x013rcu: INFO: %s self-detected stall on CPU\n",
     b"rcu: INFO: rcu_preempt self-detected stall on CPU"),
    ("rcu-stall", b"\x013rcu: INFO: %s detected stalls on CPUs/tasks:\n",
     b"rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:"),
    ("hung-task", b"\x013INFO: task %s:%d blocked for more than %ld seconds.\n",
     b"INFO: task kworker/0:1:23 blocked for more than 120 seconds."),
    ("hung-task", b"\x013INFO: task %s:%d blocked%s for more than %ld seconds.\n",
     b"INFO: task init:1 blocked in I/O wait for more than 120 seconds."),
]  # fmt: skip
INNOCENT = [
    b"%s",
    b"%s: %s",
    b"\x014WARNING: Unprivileged eBPF is enabled with eIBRS+LFENCE mitigation and SMT\n",
    b"\x013INFO: task %s:%d is blocked on a mutex likely owned by task %s:%d.\n",
    b"\x014BUG: in callback at %d, callsite %d !calls_callback\n",
    b"[    1.000000] init: WARNING: the disk is full",
    b"no BUG: here",
    b"",
]


@pytest.mark.parametrize(("kind", "message", "line"), SAID)
def test_a_complaint_is_known_by_its_format_and_by_its_line(kind, message, line):
    level, text = unprefixed(message)
    assert complaint(text, level).kind == kind
    assert complaint(line).kind == kind


@pytest.mark.parametrize("message", INNOCENT)
def test_others_are_no_complaints(message):
    level, text = unprefixed(message)
    assert complaint(text, level) is None


def test_what_comes_before_an_oops_is_told_from_the_oops():
    assert complaint(b"BUG: kernel NULL pointer dereference, address: %px").is_forerunner
    assert complaint(b"kernel BUG at %s:%u!").is_forerunner
    assert complaint(b"Oops: %s: %04lx [#%d]").is_oops
    assert not complaint(b"WARNING: %s:%d at %pS").is_forerunner
