"""An engine whose shared half is memory of its own, as it is on hardware."""

import hashlib
import os
import struct

import pytest

from bare_guest import DATA, BareGuest
from trapline.cpu.engine import PageState, Reg

PAGE = 4096
SHARED_GLA = 0x31_0000  # a linear address whose page table entry gets the shared bit
LARGE = 2 << 20

# Write to the private page and to the shared page of the same GPA, and read both back.
SOURCE = """
    mov rbx, {data}
    mov rdx, {shared}
    mov qword ptr [rbx], 0x1111
    mov qword ptr [rdx], 0x2222
    mov rax, [rbx]
    mov rcx, [rdx]
    hlt
"""


def guest(*, split):
    made = BareGuest(SOURCE.format(data=DATA, shared=SHARED_GLA), split=split)
    made.map(SHARED_GLA, made.memory.shared_bit | DATA | 7)
    made.memory.set_shared(DATA, PAGE, PageState.MAPPED)
    return made


@pytest.mark.parametrize(("split", "private"), [(True, 0x1111), (False, 0x2222)])
def test_the_halves_are_apart_when_split(split, private):
    with guest(split=split) as made:
        made.run()
        assert made.vcpu.regs[Reg.RAX] == private
        assert made.vcpu.regs[Reg.RCX] == 0x2222
        assert struct.unpack_from("<Q", made.memory.ram, DATA) == (private,)
        assert struct.unpack_from("<Q", made.memory.shared_ram, DATA) == (0x2222,)
        assert made.vcpu.read(SHARED_GLA, 8) == struct.pack("<Q", 0x2222)
        assert made.vcpu.read(DATA, 8) == struct.pack("<Q", private)


def test_whole_large_pages_are_apart_too():
    with guest(split=True) as made:
        made.map(SHARED_GLA, made.memory.shared_bit | LARGE + 0x1000 | 7)
        made.memory.set_shared(LARGE, LARGE, PageState.MAPPED)
        made.run()
        assert struct.unpack_from("<Q", made.memory.shared_ram, LARGE + 0x1000) == (0x2222,)
        assert struct.unpack_from("<Q", made.memory.ram, LARGE + 0x1000) == (0,)


def test_the_descriptor_holds_the_shared_half_only():
    with guest(split=True) as made:
        made.run()
        assert os.pread(made.memory.shared_fd, 8, DATA) == struct.pack("<Q", 0x2222)
        os.pwrite(made.memory.shared_fd, b"device!!", DATA)
        assert made.vcpu.read(SHARED_GLA, 8) == b"device!!"


def test_what_was_in_a_page_is_gone_when_it_is_unshared():
    with guest(split=True) as made:
        made.run()
        made.memory.set_shared(DATA, PAGE, PageState.ABSENT)
        assert os.lseek(made.memory.shared_fd, 0, os.SEEK_HOLE) == 0
        with pytest.raises(OSError, match="No such device"):
            os.lseek(made.memory.shared_fd, 0, os.SEEK_DATA)
        made.memory.set_shared(DATA, PAGE, PageState.MAPPED)
        assert made.vcpu.read(SHARED_GLA, 8) == bytes(8)


def test_the_host_writes_to_the_half_it_is_told():
    with guest(split=True) as made:
        assert made.vcpu.write(SHARED_GLA, b"to share")
        assert bytes(made.memory.ram[DATA : DATA + 8]) == bytes(8)
        assert bytes(made.memory.shared_ram[DATA : DATA + 8]) == b"to share"


def test_a_split_memory_has_no_snapshots():
    with guest(split=True) as made, pytest.raises(ValueError, match="cannot be frozen"):
        made.engine.freeze()


@pytest.mark.parametrize("split", [False, True])
def test_the_digest_of_memory_is_that_of_its_bytes(factory, split):
    size = 8 << 20
    engine = factory(size, split_ram=split)
    memory = engine.memory
    memory.ram[3 * PAGE : 3 * PAGE + 5] = b"bytes"
    memory.ram[-1] = 1
    digest = memory.digest()
    assert digest == hashlib.blake2b(memory.ram, digest_size=16).hexdigest()
    if not split:
        frozen = engine.freeze()
        memory.ram[0] = 1
        assert memory.digest() == hashlib.blake2b(memory.ram, digest_size=16).hexdigest()
        engine.restore(frozen)
        assert memory.digest() == digest
    engine.close()
