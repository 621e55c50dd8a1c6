"""Tasks read from guest memory, which may hold anything."""

import struct

import pytest

from trapline.kernel.live.tasks import MAX_TASKS, TaskReader
from trapline.kernel.types.btf import Member

BASE = 0xFFFF888000000000
SIZE = 0x1000
TASK = {
    "__state": Member(0, "unsigned int"),
    "stack": Member(8, "void *"),
    "tasks": Member(16, "struct list_head"),
    "pid": Member(32, "int"),
    "comm": Member(40, "char[16]"),
    "thread": Member(64, "struct thread_struct"),
}
THREAD = {"sp": Member(8, "unsigned long")}


class Types:
    def __init__(self, task=TASK, thread=THREAD):
        self.known = {"task_struct": task, "thread_struct": thread}

    def struct(self, name):
        return self.known.get(name)


def memory_of(*tasks):
    """Lay out tasks a page each, in a ring; each is (PID, name, state)."""
    ram = bytearray(SIZE * len(tasks))
    for index, (pid, name, state) in enumerate(tasks):
        at, following = index * SIZE, BASE + (index + 1) % len(tasks) * SIZE
        stack = BASE + at + 0x400
        struct.pack_into("<QQQ", ram, at, state, stack, following + 16)
        struct.pack_into("<i4x16s", ram, at + 32, pid, name)
        struct.pack_into("<Q", ram, at + 72, stack + 0x100)
        struct.pack_into("<7Q", ram, at + 0x500, 15, 14, 13, 12, 0xB, 0xBB, 0xFFFFFFFF81000000)

    def read(address, size):
        start = address - BASE
        return bytes(ram[start : start + size]) if start >= 0 and start + size <= len(ram) else None

    return ram, read


def tasks(read, types=None):
    return TaskReader(read, types or Types(), BASE).read()


def test_pid_1_comes_first_and_then_the_rest_in_order():
    _, read = memory_of((0, b"swapper", 0), (7, b"kworker", 0x402), (1, b"init", 2), (2, b"kt", 1))
    found = tasks(read)
    assert [(task.pid, task.comm, task.state) for task in found] == [
        (1, "init", "D"), (0, "swapper", "R"), (2, "kt", "S"), (7, "kworker", "I"),
    ]  # fmt: skip


def test_a_task_goes_on_with_what_it_left_on_its_stack():
    _, read = memory_of((0, b"swapper", 0))
    (task,) = tasks(read)
    assert task.registers.rip == 0xFFFFFFFF81000000
    assert (task.registers.rbp, task.registers.r15) == (0xBB, 15)
    assert task.registers.rsp == task.stack + 0x100 + 56
    assert task.is_on(task.stack)
    assert not task.is_on(task.stack - 1)


@pytest.mark.parametrize("link", [0, 1, BASE - 8, BASE + 16, 2**64 - 1, 0x1000])
def test_a_list_that_leads_nowhere_ends(link):
    ram, read = memory_of((0, b"swapper", 0), (1, b"init", 1))
    struct.pack_into("<Q", ram, 16, link)
    assert [task.pid for task in tasks(read)] == [0]


def test_an_endless_list_ends():
    class Endless:
        def __call__(self, address, size):
            # Each task leads to one that was not seen.
            if size == 8 and address % 0x1000 == 16:
                return struct.pack("<Q", address + 0x1000)
            return b"\x01" * size

    assert len(tasks(Endless())) == MAX_TASKS


def test_types_that_do_not_describe_tasks_give_none():
    _, read = memory_of((0, b"swapper", 0))
    without = {name: member for name, member in TASK.items() if name != "comm"}
    assert tasks(read, Types(without)) == ()
    assert tasks(read, Types(thread={})) == ()
