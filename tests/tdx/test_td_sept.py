"""Private and shared page states, and what reaches the engine."""

import pytest
from fake_td import FakeMemory

from trapline.tdx.sept import (
    LARGE_SIZE,
    LEVEL_2M,
    LEVEL_4K,
    PAGE_SIZE,
    AcceptResult,
    Sept,
    SeptState,
    SharedState,
)

MIB = 1 << 20


@pytest.fixture
def memory():
    return FakeMemory(8 * MIB)


@pytest.fixture
def sept(memory):
    return Sept(memory, 8 * MIB)


def pages(gpa, size):
    return set(range(gpa >> 12, (gpa + size) >> 12))


def test_added_pages_are_mapped_and_augmented_ones_are_not(memory, sept):
    sept.add(0, MIB)
    sept.aug(MIB, MIB)
    assert sept.private_state(MIB - 1) == SeptState.MAPPED
    assert sept.private_state(MIB) == SeptState.PENDING
    assert sept.private_state(2 * MIB) == SeptState.FREE
    assert memory.mapped_private() == pages(0, MIB)


def test_aug_leaves_existing_pages_alone(memory, sept):
    sept.add(PAGE_SIZE, PAGE_SIZE)
    sept.aug(0, 3 * PAGE_SIZE)
    assert [sept.private_state(n * PAGE_SIZE) for n in range(3)] == [
        SeptState.PENDING,
        SeptState.MAPPED,
        SeptState.PENDING,
    ]
    assert memory.mapped_private() == {1}


def test_accept_of_4k_maps_and_zeroes(memory, sept):
    sept.aug(0, MIB)
    memory.ram[PAGE_SIZE : PAGE_SIZE + 4] = b"old!"
    memory.ram[0:4] = b"keep"
    assert sept.accept(PAGE_SIZE, LEVEL_4K).result is AcceptResult.ACCEPTED
    assert bytes(memory.ram[PAGE_SIZE : PAGE_SIZE + 4]) == bytes(4)
    assert bytes(memory.ram[0:4]) == b"keep"
    assert memory.mapped_private() == {1}


def test_accept_of_2m_needs_a_2m_leaf(memory, sept):
    sept.aug(0, 4 * MIB, LEVEL_2M)
    memory.ram[LARGE_SIZE - 1] = 7
    outcome = sept.accept(0, LEVEL_2M)
    assert outcome.result is AcceptResult.ACCEPTED
    assert memory.mapped_private() == pages(0, LARGE_SIZE)
    assert memory.ram[LARGE_SIZE - 1] == 0
    # The second region is one leaf too: a 4 KiB request cannot split it.
    refused = sept.accept(LARGE_SIZE, LEVEL_4K)
    assert (refused.result, refused.level) == (AcceptResult.VIOLATION, LEVEL_2M)
    sept.demote(LARGE_SIZE)
    assert sept.accept(LARGE_SIZE, LEVEL_4K).result is AcceptResult.ACCEPTED


def test_accept_of_2m_over_4k_pages_is_a_size_mismatch(sept):
    sept.aug(0, LARGE_SIZE)
    assert sept.accept(0, LEVEL_2M).result is AcceptResult.SIZE_MISMATCH


@pytest.mark.parametrize("level", [LEVEL_4K, LEVEL_2M])
def test_accept_of_nothing_is_a_violation(sept, level):
    outcome = sept.accept(0, level)
    assert outcome.result is AcceptResult.VIOLATION
    assert outcome.state == SeptState.FREE
    assert not outcome.is_leaf


def test_accept_twice_reports_the_level_of_the_leaf(sept):
    sept.aug(0, LARGE_SIZE, LEVEL_2M)
    sept.accept(0, LEVEL_2M)
    assert sept.accept(0, LEVEL_2M).result is AcceptResult.ALREADY_ACCEPTED
    again = sept.accept(5 * PAGE_SIZE, LEVEL_4K)
    assert (again.result, again.level) == (AcceptResult.ALREADY_ACCEPTED, LEVEL_2M)


def test_blocked_pages_come_back_as_they_were(memory, sept):
    sept.add(0, PAGE_SIZE)
    sept.aug(PAGE_SIZE, PAGE_SIZE)
    sept.block(0, 2 * PAGE_SIZE)
    assert memory.mapped_private() == set()
    assert sept.accept(PAGE_SIZE, LEVEL_4K).result is AcceptResult.VIOLATION
    sept.unblock(0, 2 * PAGE_SIZE)
    assert sept.private_state(0) == SeptState.MAPPED
    assert sept.private_state(PAGE_SIZE) == SeptState.PENDING
    assert memory.mapped_private() == {0}


def test_sharing_takes_the_private_page_and_its_bytes_away(memory, sept):
    sept.add(0, 4 * PAGE_SIZE)
    memory.ram[PAGE_SIZE] = 0x5A
    sept.share(PAGE_SIZE, PAGE_SIZE)
    assert sept.private_state(PAGE_SIZE) == SeptState.FREE
    assert sept.shared_state(PAGE_SIZE) == SharedState.MAPPED
    assert memory.ram[PAGE_SIZE] == 0
    assert memory.mapped_private() == {0, 2, 3}
    assert memory.mapped_shared() == {1}
    # What is shared already keeps its content.
    memory.ram[PAGE_SIZE] = 0x11
    sept.share(PAGE_SIZE, 2 * PAGE_SIZE)
    assert memory.ram[PAGE_SIZE] == 0x11
    sept.unshare(PAGE_SIZE, 2 * PAGE_SIZE)
    assert sept.shared_state(PAGE_SIZE) == SharedState.ABSENT
    assert memory.mapped_shared() == set()


def test_sharing_a_part_splits_a_large_leaf(sept):
    sept.aug(0, LARGE_SIZE, LEVEL_2M)
    sept.accept(0, LEVEL_2M)
    sept.share(PAGE_SIZE, PAGE_SIZE)
    assert sept.level(0) == LEVEL_4K
    assert sept.accept(0, LEVEL_2M).result is AcceptResult.SIZE_MISMATCH


def test_outside_ram_nothing_is_private_and_shared_is_mmio(sept):
    assert sept.private_state(8 * MIB) == SeptState.FREE
    assert sept.shared_state(0xFEC00000) == SharedState.MMIO
    assert sept.accept(8 * MIB, LEVEL_2M).result is AcceptResult.VIOLATION
    assert sept.level(1 << 38) == LEVEL_4K


@pytest.mark.parametrize(
    ("gpa", "size"), [(0, 0), (1, PAGE_SIZE), (0, 100), (8 * MIB, PAGE_SIZE), (-PAGE_SIZE, 8192)]
)
def test_bad_ranges_are_refused(sept, gpa, size):
    assert not sept.in_ram(gpa, size)
    with pytest.raises(ValueError, match="not whole pages of RAM"):
        sept.add(gpa, size)


def test_restore_pushes_only_what_changed(memory, sept):
    sept.add(0, MIB)
    sept.share(PAGE_SIZE, PAGE_SIZE)
    before = sept.save()
    assert sept.save() is before
    sept.remove(8 * PAGE_SIZE, PAGE_SIZE)
    sept.unshare(PAGE_SIZE, PAGE_SIZE)
    sept.aug(2 * MIB, LARGE_SIZE, LEVEL_2M)
    memory.private.clear()
    memory.shared.clear()
    sept.restore(before)
    assert set(memory.private) == {8}
    assert set(memory.shared) == {1}
    assert sept.private_state(8 * PAGE_SIZE) == SeptState.MAPPED
    assert sept.level(2 * MIB) == LEVEL_4K
    assert sept.save() is before


def test_memory_size_must_be_whole_pages(memory):
    with pytest.raises(ValueError, match="multiple of 4096"):
        Sept(memory, 1000)


def test_counts_follow_the_states(sept):
    sept.add(0, MIB)
    sept.aug(MIB, PAGE_SIZE)
    assert sept.count(SeptState.MAPPED) == 256
    assert sept.count(SeptState.PENDING) == 1


def test_public_state_numbers_are_the_modules():
    # sept_state_lookup.c: FREE 0, BLOCKED 1, PENDING 2, PENDING_BLOCKED 3, MAPPED 4.
    assert [state.public for state in SeptState] == [0, 2, 4, 1, 3]


def test_pages_of_a_range_that_are_not_shared_are_named(sept):
    sept.share(PAGE_SIZE, 3 * PAGE_SIZE)
    assert sept.not_shared(PAGE_SIZE, 3 * PAGE_SIZE) == []
    assert sept.not_shared(0, 6 * PAGE_SIZE) == [0, 4 * PAGE_SIZE, 5 * PAGE_SIZE]
    sept.unshare(2 * PAGE_SIZE, PAGE_SIZE)
    assert sept.not_shared(PAGE_SIZE, 3 * PAGE_SIZE) == [2 * PAGE_SIZE]
