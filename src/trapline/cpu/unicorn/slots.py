"""The control block: what the engine and its native code tell each other."""

from typing import Final


class Slot:
    """Index of each u64 in the control block."""

    EXIT: Final = 0  # 0x100 + exit code, IN_DELIVERY_FLAG if an event was being delivered; 0: none
    INFO: Final = 1  # the exit's error code
    CODE: Final = 2  # the first 8 bytes of the instruction, 0 if they cross a page or are not there
    GLA: Final = 3  # linear address of the last TLB fill
    ACCESS: Final = 4  # its kind: 0 load, 1 store, 2 fetch
    BYTES: Final = 5  # code bytes entered so far: the base of virtual time
    LIMIT: Final = 6  # exit with Svm.INTR before the next block once BYTES is there
    STEP: Final = 7  # 1: let the next block pass the limit
    KIND: Final = 8  # event to deliver: DeliveryKind
    VECTOR: Final = 9
    ERROR: Final = 10
    OLD: Final = 11  # what a fault during the delivery is combined with (old_exception)
    NEXT_RIP: Final = 12  # return address of a software interrupt
    IN_KIND: Final = 13  # the event being delivered, 0 when none
    IN_VECTOR: Final = 14
    IN_ERROR: Final = 15
    WANTED: Final = 16  # interrupt_request on the next entry
    COUNT: Final = 17  # instructions, while they are counted
    COUNT_LIMIT: Final = 18  # exit with Svm.COUNT before the instruction that would pass it
    SKIP: Final = 19  # a breakpoint here does not fire, once
    TRAPPED: Final = 20  # bit per vector: leave with an exit rather than deliver
    SKIPPED: Final = 21  # the breakpoint that passed last
    FILLS: Final = 22  # TLB fills so far
    GROW_AT: Final = 23  # flush the TLB, which lets it grow, at this many
    RESUME: Final = 24  # the next block is here and has been counted already
    WALK: Final = 25  # what the last TLB fill that failed was after: FailedWalk
    ENTRY_SKIP: Final = 26  # an entry that is not told of, once
    END: Final = 27
    # What follows is no state of the guest: a restore leaves it alone.
    WATCHING: Final = 27  # 1: tell of the entries in EntryTable, and of user code at CPL 0


class FailedWalk:
    """Slot.WALK."""

    UNKNOWN: Final = 0
    TABLE: Final = 1
    PAGE: Final = 2


class DeliveryKind:
    """Slot.KIND."""

    NONE: Final = 0
    EXCEPTION: Final = 1
    INTERRUPT: Final = 2  # external, NMI included: no error code
    SOFTWARE: Final = 3  # INT n, INT3


class EntryTable:
    """Behind the slots: which addresses the BLOCK hook tells of; offsets in the control block.

    One byte for each value of address bits 14:4, not 0 where one of the addresses has it; then
    the number of addresses, and the addresses.
    """

    FILTER: Final = 4096
    FILTER_SIZE: Final = 2048
    COUNT: Final = FILTER + FILTER_SIZE
    LIST: Final = COUNT + 8
    CONTROL_SIZE: Final = 12288


IN_DELIVERY_FLAG = 1 << 16
NEVER = (1 << 63) - 1
EXCEPTION_BYTES = 400  # what an exception adds to Slot.BYTES: about 100 cycles
COUNT_START = 1 << 62  # of Slot.COUNT, which exits also lower while nothing is counted

LOG_ENTRIES = 8191  # translations remembered between two restores
