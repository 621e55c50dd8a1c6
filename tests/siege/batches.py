"""Runs inputs in batches, each in a process of its own with limits, and counts what came."""

import faulthandler
import json
import mmap
import os
import random
import resource
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context

from trapline.base.errors import ExitCode, TraplineError
from trapline.base.printable import printable

SECONDS = 20  # for one input
MEMORY = 4 << 30
WRITTEN = 256 << 20
BATCH = 500

#: Makes one input, and what trapline is to do with it. Only a TraplineError may come out.
Try = Callable[[bytes], None]
Mutate = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Kind:
    """A kind of input: valid ones, how they are damaged, and what reads them."""

    name: str
    seeds: tuple[bytes, ...]
    mutate: Mutate
    read: Try
    dear: int = 1  # a campaign makes that many times fewer of it

    def make(self, number: int) -> bytes:
        """Make the input of a number, always the same; the first ones are the seeds, whole."""
        if number < len(self.seeds):
            return self.seeds[number]
        rng = random.Random(f"{self.name}:{number}")
        return self.mutate(rng, rng.choice(self.seeds))


@dataclass
class Tally:
    """What came of the inputs of one kind."""

    inputs: int = 0
    read: int = 0
    refused: int = 0
    crashes: Counter[str] = field(default_factory=Counter)
    hangs: int = 0
    peak: int = 0  # KiB
    slowest: float = 0.0  # seconds of one input
    faults: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        """Count what came elsewhere as well; faults stay with their kind."""
        self.inputs += other.inputs
        self.read += other.read
        self.refused += other.refused
        self.crashes.update(other.crashes)
        self.hangs += other.hangs
        self.peak = max(self.peak, other.peak)
        self.slowest = max(self.slowest, other.slowest)


# What a batch says while it runs: the number at work, inputs read, inputs refused, slowest (s).
_STATE = struct.Struct("<qqqd")


def attempt(kind: Kind, data: bytes) -> str | None:
    """Try one input here; returns None if it was read, "" if refused, else what went wrong."""
    try:
        kind.read(data)
    except TraplineError as error:
        text = str(error)
        if error.exit_code == ExitCode.INTERNAL:
            return f"an error without an exit code: {type(error).__name__}: {text}"
        if text != printable(text) or "\n" in text:
            return f"not printable: {text!r}"
        return ""
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        return f"{type(error).__name__}: {error}"
    return None


def run(kind: Kind, first: int, count: int) -> Tally:
    """Try `count` inputs from a number on."""
    tally = Tally()
    number, end = first, first + count
    while number < end:
        number = _batch(kind, number, min(end, number + BATCH), tally)
    return tally


def _batch(kind: Kind, first: int, end: int, tally: Tally) -> int:
    """Try a batch in a child; returns the number to go on with, behind one that killed it."""
    state = mmap.mmap(-1, _STATE.size)
    said, says = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(said)
        _limit()
        _try_all(kind, first, end, state, says)
        os._exit(0)
    os.close(says)
    with os.fdopen(said, "rb") as pipe:
        lines = pipe.read().splitlines()
    _, status, usage = os.wait4(child, 0)
    at, read, refused, slowest = _STATE.unpack(state[:])
    for line in lines:
        number, what = json.loads(line)
        _note(tally, number, what)
    tally.peak = max(tally.peak, usage.ru_maxrss)
    tally.slowest = max(tally.slowest, slowest)
    tally.read += read
    tally.refused += refused
    died = os.WIFSIGNALED(status) or os.WEXITSTATUS(status) != 0
    tally.inputs += (at + 1 if died else end) - first
    if not died:
        return end
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        tally.hangs += 1
        tally.faults.append((at, f"still at work after {SECONDS} s"))
    else:
        _note(tally, at, f"died: wait status {status:#x}")
    return at + 1


def _note(tally: Tally, number: int, what: str) -> None:
    tally.crashes[what.partition(":")[0]] += 1
    tally.faults.append((number, what))


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))
    faulthandler.disable()  # of pytest, which would tell of each planted death
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 1)
    if not os.environ.get("SIEGE_ERRORS"):
        os.dup2(quiet, 2)


def _try_all(kind: Kind, first: int, end: int, state: mmap.mmap, says: int) -> None:
    read = refused = 0
    slowest = 0.0
    for number in range(first, end):
        state[:] = _STATE.pack(number, read, refused, slowest)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        began = time.perf_counter()
        what = attempt(kind, kind.make(number))
        slowest = max(slowest, time.perf_counter() - began)
        if what is None:
            read += 1
        elif not what:
            refused += 1
        else:
            os.write(says, json.dumps([number, what[:300]]).encode() + b"\n")
    signal.setitimer(signal.ITIMER_REAL, 0)
    state[:] = _STATE.pack(end - 1, read, refused, slowest)


def run_all(kinds: list[Kind], count: int, lanes: int) -> Iterator[tuple[Kind, Tally]]:
    """Run `count` inputs of each kind, fewer of dear ones; yields each kind as it ends."""
    with get_context("fork").Pool(lanes, _adopt, (kinds, count)) as pool:
        for index, tally in pool.imap_unordered(_lane, range(len(kinds))):
            yield kinds[index], tally


_adopted: tuple[list[Kind], int] = ([], 0)


def _adopt(kinds: list[Kind], count: int) -> None:
    global _adopted  # noqa: PLW0603 - functions do not travel between processes, but by fork
    _adopted = (kinds, count)


def _lane(index: int) -> tuple[int, Tally]:
    kinds, count = _adopted
    return index, run(kinds[index], 0, count // kinds[index].dear)
