"""Which tasks a kernel has, and where each of them waits, read from its memory.

`init_task.tasks` lists all processes and kernel threads; member offsets come from the kernel's
BTF. The memory belongs to a guest that may be hostile or broken: pointers are checked, and the
walk is bounded.

What a task that does not run has on its stack, from `thread.sp` on, is struct inactive_task_frame
(arch/x86/include/asm/switch_to.h), which __switch_to_asm() pushes.
"""

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from trapline.kernel.live.unwind import STACK_SIZE, SavedRegisters

if TYPE_CHECKING:
    from trapline.kernel.live.modules import ReadMemory
    from trapline.kernel.types.btf import Btf

MAX_TASKS: Final = 4096
_NEEDED: Final = ("tasks", "pid", "comm", "thread", "stack")
_COMM_SIZE: Final = 16
_FRAME: Final = struct.Struct("<7Q")  # r15 r14 r13 r12 bx bp ret_addr
# include/linux/sched.h; `__state` since v5.14.
_STATES: Final = ((0x0002, "D"), (0x0001, "S"), (0x0004, "T"), (0x0008, "t"))
_IDLE: Final = 0x0402  # TASK_UNINTERRUPTIBLE | TASK_NOLOAD: nobody counts it as waiting
_KERNEL_HALF: Final = 1 << 63


class LiveTask(NamedTuple):
    """One task. `state` is a letter as in ps; `stack` is where its stack begins, a GLA.

    `registers` are those with which it goes on, None where they cannot be read.
    """

    pid: int
    comm: str
    state: str
    stack: int
    registers: SavedRegisters | None

    def is_on(self, rsp: int) -> bool:
        """Whether a stack pointer is on this task's stack: the task runs."""
        return self.stack <= rsp < self.stack + STACK_SIZE


class TaskReader:
    """Reads the list of tasks; `init_task` is the run-time address of that symbol.

    `usable` is False where the BTF does not describe tasks; then `read` returns nothing.
    """

    def __init__(self, read: "ReadMemory", btf: "Btf", init_task: int) -> None:
        self._read = read
        self._first = init_task
        task, thread = btf.struct("task_struct") or {}, btf.struct("thread_struct") or {}
        self._state = "__state" if "__state" in task else "state"
        self.usable = {*_NEEDED, self._state} <= set(task) and "sp" in thread
        if self.usable:
            self._at = {name: task[name].offset for name in (*_NEEDED, self._state)}
            self._at["sp"] = self._at["thread"] + thread["sp"].offset

    def read(self) -> tuple[LiveTask, ...]:
        """Return what is there now, PID 1 first, then by PID."""
        if not self.usable:
            return ()
        found: list[LiveTask] = []
        seen: set[int] = set()
        address: int | None = self._first
        while address and address not in seen and len(found) < MAX_TASKS:
            seen.add(address)
            task = self._one(address)
            if task is None:
                break
            found.append(task)
            link = self._number(address + self._at["tasks"], 8)
            address = None if link is None else link - self._at["tasks"]
        return tuple(sorted(found, key=lambda task: (task.pid != 1, task.pid)))

    def _one(self, address: int) -> LiveTask | None:
        pid = self._number(address + self._at["pid"], 4)
        comm = self._bytes(address + self._at["comm"], _COMM_SIZE)
        state = self._number(address + self._at[self._state], 4)
        stack = self._number(address + self._at["stack"], 8)
        if pid is None or comm is None or state is None or not stack:
            return None
        name = comm.partition(b"\0")[0].decode("utf-8", "replace")
        return LiveTask(pid, name, _letter(state), stack, self._registers(address))

    def _registers(self, address: int) -> SavedRegisters | None:
        sp = self._number(address + self._at["sp"], 8)
        frame = None if not sp else self._bytes(sp, _FRAME.size)
        if sp is None or frame is None:
            return None
        r15, r14, r13, r12, rbx, rbp, rip = _FRAME.unpack(frame)
        values = dict.fromkeys(SavedRegisters._fields, 0)
        values |= {"r15": r15, "r14": r14, "r13": r13, "r12": r12, "rbx": rbx, "rbp": rbp}
        return SavedRegisters(**values | {"rip": rip, "rsp": sp + _FRAME.size, "cs": 0x10})

    def _number(self, address: int, size: int) -> int | None:
        data = self._bytes(address, size)
        return None if data is None else int.from_bytes(data, "little")

    def _bytes(self, address: int, size: int) -> bytes | None:
        if not _KERNEL_HALF <= address <= (1 << 64) - size:
            return None
        data = self._read(address, size)
        return data if data is not None and len(data) == size else None


def _letter(state: int) -> str:
    if state == 0:
        return "R"
    if state & _IDLE == _IDLE:
        return "I"
    return next((letter for bit, letter in _STATES if state & bit), "?")
