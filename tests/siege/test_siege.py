"""A small siege, and planted faults that one must find."""

import os
import random
import signal

import pytest

import tiny_kernel
from siege import batches, kills, kinds
from siege.batches import Kind, run
from siege.guests import guests
from siege.mutate import mangled, retyped, reworded
from trapline.base.errors import BadInputFileError

FEW = 40


@pytest.fixture(scope="module")
def folder():
    made = kinds.make_folder()
    yield made
    kinds.remove_folder(made)


@pytest.fixture(scope="module")
def all_kinds(folder):
    return {kind.name: kind for kind in kinds.all_kinds(folder)}


def test_valid_input_of_each_kind_is_read(all_kinds):
    for kind in all_kinds.values():
        for seed in kind.seeds:
            kind.read(seed)


def test_no_input_breaks_anything(all_kinds):
    for kind in all_kinds.values():
        tally = run(kind, 0, FEW)
        assert tally.faults == [], kind.name
        assert tally.inputs == tally.read + tally.refused == FEW, kind.name


def test_no_guest_breaks_anything():
    tally = run(guests(), 0, FEW)
    assert (tally.faults, tally.inputs) == ([], FEW)


def test_an_input_is_the_same_each_time(all_kinds):
    for kind in (*all_kinds.values(), guests()):
        assert kind.make(33) == kind.make(33)
    made = {all_kinds["elf"].make(number) for number in range(1, FEW)}
    assert len(made) > FEW // 2


@pytest.mark.parametrize("damage", [mangled, reworded, retyped])
def test_damage_is_at_times_none_and_mostly_some(damage):
    sound = b'{"a": [1, 2, {"b": "c"}],\n "d": null}\n'
    made = [damage(random.Random(seed), sound) for seed in range(200)]
    assert sum(each != sound for each in made) > 150


def _raise(error):
    raise error


FAULTS = {
    "an exception": (lambda _: _raise(KeyError("x")), "KeyError"),
    "a signal": (lambda _: os.kill(os.getpid(), signal.SIGSEGV), "died"),
    "an exit": (lambda _: os._exit(3), "died"),
    "a hang": (lambda _: signal.pause(), "still at work"),
    "memory": (lambda _: bytearray(5 << 30), "MemoryError"),
    "an escape": (lambda _: _raise(BadInputFileError("\x1b[31m")), "not printable"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_the_rest_is_tried(fault, monkeypatch):
    monkeypatch.setattr(batches, "SECONDS", 0.2)
    reader, expected = FAULTS[fault]

    def read(data):
        if data == b"13":
            reader(data)
        elif data == b"14":
            raise BadInputFileError("not good.")

    planted = Kind("planted", tuple(b"%d" % n for n in range(20)), lambda *_: b"", read)
    tally = run(planted, 0, 20)
    assert [number for number, _ in tally.faults] == [13]
    assert tally.faults[0][1].startswith(expected)
    assert (tally.inputs, tally.read, tally.refused) == (20, 18, 1)


def test_killed_commands_leave_nothing_behind(folder):
    vmlinux = tiny_kernel.build_vmlinux(folder / "vmlinux")
    for victim in kills.victims(vmlinux, None):
        toll = kills.campaign(victim, 5, folder)
        assert (toll.faults, toll.kills) == ([], 5)


SLOVENLY = """
import os, sys, time
out = sys.argv[1]
with open(out + "/result.json", "w") as file:
    file.write("[1,"); file.flush()
    if os.fork() == 0:
        os.closerange(0, 3)
        time.sleep(30)
    time.sleep(1)
    file.write("2]")
"""


def test_what_a_slovenly_command_leaves_is_found(folder, monkeypatch):
    monkeypatch.setattr(kills, "PROGRAM", [*kills.PROGRAM[:2], SLOVENLY])
    monkeypatch.setattr(kills, "GONE", 0.3)
    executioner = kills.Executioner(folder)
    victim = kills.Victim("slovenly", ("{out}",))
    executioner._takes["slovenly"] = 0.6
    executioner._whole["slovenly"] = b"[1,2]"
    toll = kills.Toll()
    for number in range(4):
        executioner.kill(victim, number, toll, look_again=False)
    assert any("half a result" in fault for fault in toll.faults)
    assert any("processes are left" in fault for fault in toll.faults)
