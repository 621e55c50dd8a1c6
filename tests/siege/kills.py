"""Kills commands at random moments, and looks at what they leave behind."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from trapline.base.errors import ExitCode

PROGRAM = [sys.executable, "-c", "from trapline.cli.start import main; main()"]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
DONE = {ExitCode.CLEAN, ExitCode.FINDINGS}
AFTER = {
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {ExitCode.TERMINATED, -signal.SIGTERM},
    signal.SIGINT: {ExitCode.INTERRUPTED, -signal.SIGINT},
}
LONGEST = 300  # seconds of one whole run
GONE = 2.0  # seconds in which workers notice that the command died


@dataclass(frozen=True)
class Victim:
    """A command: its arguments, `{out}` for its result; `keeps` is what it may leave besides."""

    name: str
    arguments: tuple[str, ...]
    keeps: tuple[str, ...] = ()
    again: tuple[str, ...] = ()  # what a second run says as well, to go on
    share: int = 4  # of the kills of a campaign; less where a run takes long

    def command(self, folder: Path, *, again: bool) -> list[str]:
        """Make the command line that writes into a folder."""
        words = [*self.arguments, *(self.again if again else ())]
        return [*PROGRAM, *(word.replace("{out}", str(folder)) for word in words)]


def victims(vmlinux: Path, kernel: str | None) -> list[Victim]:
    """Name what can be killed: with a real kernel, the commands that run a guest as well."""
    result = ("--format", "json", "-o", "{out}/result.json")
    found = [
        Victim("scan", ("scan", str(vmlinux), *result)),
        Victim("rules", ("rules", "show", *result)),
    ]
    if kernel:
        store = ("explore", kernel, "--scenario", "syscall-gap", "--store", "{out}/store.sqlite")
        kept = ("store.sqlite", "store.sqlite-wal", "store.sqlite-shm")
        found += [
            Victim("explore", (*store, *result), kept, ("--resume",), 2),
            Victim("boot", ("boot", kernel, "--quiet", *result), share=2),
            Victim("verify", ("verify", kernel, *result), share=1),
        ]
    return found


@dataclass
class Toll:
    """What came of killing one command."""

    kills: int = 0
    ended_before: int = 0
    again: int = 0
    faults: list[str] = field(default_factory=list)
    by_signal: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        signals = ", ".join(f"{count} {name}" for name, count in sorted(self.by_signal.items()))
        return (
            f"{self.kills:,} kills ({signals}), {self.ended_before} after its end, "
            f"{self.again} next runs: {len(self.faults)} faults"
        )


class Executioner:
    """Kills commands that write into folders of its own, and remembers what whole runs give."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._whole: dict[str, bytes] = {}
        self._takes: dict[str, float] = {}

    def learn(self, victim: Victim) -> None:
        """Run a command to its end, for its result and the time that it takes."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        began = time.monotonic()
        process = self._start(victim, folder, again=False)
        _, errors = process.communicate(timeout=LONGEST)
        if process.returncode not in DONE:
            raise RuntimeError(f"{victim.name} does not work here: {errors.decode()}")
        self._takes[victim.name] = time.monotonic() - began
        self._whole[victim.name] = (folder / "result.json").read_bytes()
        shutil.rmtree(folder)

    def kill(self, victim: Victim, number: int, toll: Toll, *, look_again: bool) -> None:
        """Kill a command once; look at what is left, and at what the next run makes of it."""
        rng = Random(f"{victim.name}:{number}")
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        how = rng.choice(SIGNALS)
        process = self._start(victim, folder, again=False)
        time.sleep(rng.uniform(0.02, 1.1 * self._takes[victim.name]))
        # Ctrl-C reaches all processes of a terminal, other signals the one that they are sent to.
        (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
        toll.kills += 1
        toll.by_signal[how.name] += 1
        where = f"{victim.name}:{number} {how.name}"
        try:
            _, errors = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            toll.faults.append(f"{where}: still there after 30 s")
            return
        toll.ended_before += process.returncode in DONE
        toll.faults += [
            f"{where}: {what}" for what in self._wrong(victim, process, how, errors, folder)
        ]
        if look_again:
            toll.again += 1
            toll.faults += [f"{where}: {what}" for what in self._wrong_next(victim, folder)]
        shutil.rmtree(folder)

    @staticmethod
    def _start(victim: Victim, folder: Path, *, again: bool) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            victim.command(folder, again=again),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _wrong(
        self,
        victim: Victim,
        process: subprocess.Popen[bytes],
        how: signal.Signals,
        errors: bytes,
        folder: Path,
    ) -> list[str]:
        wrong = []
        if process.returncode not in AFTER[how] | DONE:
            wrong.append(f"exit code {process.returncode}: {errors[-300:]!r}")
        if b"Traceback" in errors:
            wrong.append(f"a traceback: {errors[-300:]!r}")
        if not _comes_true(lambda: not _of_session(process.pid), GONE):
            wrong.append(f"processes are left: {_of_session(process.pid)}")
            os.killpg(process.pid, signal.SIGKILL)
        result = folder / "result.json"
        if result.exists() and result.read_bytes() != self._whole[victim.name]:
            wrong.append("half a result")
        left = {path.name for path in folder.iterdir()} - {"result.json", *victim.keeps}
        if left and how != signal.SIGKILL:
            wrong.append(f"files are left: {sorted(left)}")
        return wrong

    def _wrong_next(self, victim: Victim, folder: Path) -> list[str]:
        again = bool(victim.again) and (folder / victim.keeps[0]).exists()
        process = self._start(victim, folder, again=again)
        _, errors = process.communicate(timeout=LONGEST)
        if process.returncode not in DONE:
            return [f"the next run ends with {process.returncode}: {errors[-300:]!r}"]
        if (folder / "result.json").read_bytes() != self._whole[victim.name]:
            return ["the next run has another result"]
        return []


def _comes_true(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _of_session(leader: int) -> list[str]:
    """Name the processes of a session that live."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader and fields[0] != "Z":
                    found.append((entry / "cmdline").read_text().replace("\0", " ")[:80])
            except OSError:
                continue
    return found


def campaign(victim: Victim, count: int, folder: Path) -> Toll:
    """Kill a command `count` times; each fifth time, run it once more to its end."""
    toll = Toll()
    executioner = Executioner(folder)
    executioner.learn(victim)
    for number in range(count):
        executioner.kill(victim, number, toll, look_again=number % 5 == 0)
    return toll
