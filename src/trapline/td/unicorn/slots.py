"""The control block: what the engine and its native code tell each other."""

from enum import IntEnum


class Slot(IntEnum):
    """Index of each u64 in the control block."""

    EXIT = 0  # 0x100 + exit code, IN_DELIVERY_FLAG if an event was being delivered; 0: none
    INFO = 1  # the exit's error code
    CODE = 2  # the first 8 bytes of the instruction, 0 if they cross a page or are not there
    GLA = 3  # linear address of the last TLB fill
    ACCESS = 4  # its kind: 0 load, 1 store, 2 fetch
    BYTES = 5  # code bytes entered so far: the base of virtual time
    LIMIT = 6  # exit with Svm.INTR before the next block once BYTES is there
    STEP = 7  # 1: let the next block pass the limit
    KIND = 8  # event to deliver: Delivery
    VECTOR = 9
    ERROR = 10
    OLD = 11  # what a fault during the delivery is combined with (old_exception)
    NEXT_RIP = 12  # return address of a software interrupt
    IN_KIND = 13  # the event being delivered, 0 when none
    IN_VECTOR = 14
    IN_ERROR = 15
    WANTED = 16  # interrupt_request on the next entry
    COUNT = 17  # instructions, while they are counted
    COUNT_LIMIT = 18  # exit with Svm.COUNT before the instruction that would pass it
    SKIP = 19  # a breakpoint here does not fire, once
    TRAPPED = 20  # bit per vector: leave with an exit rather than deliver
    SKIPPED = 21  # the breakpoint that passed last
    FILLS = 22  # TLB fills so far
    GROW_AT = 23  # flush the TLB, which lets it grow, at this many
    DELIVERED = 24  # 32 counters: exceptions delivered without Python, by vector
    END = 56


class Delivery(IntEnum):
    """Slot.KIND."""

    NONE = 0
    EXCEPTION = 1
    INTERRUPT = 2  # external, NMI included: no error code
    SOFTWARE = 3  # INT n, INT3


IN_DELIVERY_FLAG = 1 << 16
NEVER = (1 << 63) - 1
COUNT_START = 1 << 62  # of Slot.COUNT, which exits also lower while nothing is counted

LOG_ENTRIES = 8191  # translations remembered between two restores
