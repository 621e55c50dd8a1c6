"""The pool of worker processes: deaths, errors, interrupts, and a parent that is killed."""

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
from jobs import Echo, die_at_start, refuse_to_start

from trapline.base.errors import (
    BadMachineError,
    ExitCode,
    ResourceError,
    TraplineError,
    WorkersLostError,
)
from trapline.base.workers import Pool

ECHO = partial(Echo, "> ")


def pool(count=2, make=ECHO, **options):
    return Pool(make, count, advice="try again", **options)


def kept(answer):
    return answer


def at(job):
    return f"at {job}"


def settle_crash(job, death):
    return f"{job}: {death}" if death.is_crash else None


def run(jobs, count=2, **options):
    with pool(count, **options) as workers:
        return workers.map(jobs, kept, at, settle_crash)


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("count", [1, 2])
def test_answers_come_in_the_order_of_the_jobs(count, ahead):
    jobs = [str(number) for number in range(50)]
    assert run(jobs, count, ahead=ahead) == [f"> {job}" for job in jobs]


def test_a_pool_serves_more_than_once_and_no_job_at_all():
    with pool() as workers:
        assert workers.map([], kept, at) == []
        assert workers.map(["a"], kept, at) == ["> a"]
        assert workers.map(["b"], kept, at) == ["> b"]


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_killed_worker_is_replaced_and_its_jobs_are_done_again(tmp_path, ahead):
    jobs = ["a", f"once {tmp_path / 'mark'}", "b", "c", "d"]
    assert run(jobs, 1, ahead=ahead) == [f"> {job}" for job in jobs]


def test_a_job_that_workers_are_killed_at_is_named():
    with pytest.raises(WorkersLostError) as error:
        run(["a", "kill", "b"])
    assert str(error.value) == (
        "worker processes keep dying at kill (the last one was killed, perhaps for want of "
        "memory); try again."
    )
    assert error.value.exit_code == ExitCode.WORKERS_LOST == 28


def test_workers_that_are_killed_now_here_now_there_are_given_up(tmp_path):
    jobs = [f"once {tmp_path / str(number)}" for number in range(100)]
    with pytest.raises(WorkersLostError, match="keep dying at once"):
        run(jobs)
    assert len(list(tmp_path.iterdir())) < 20


def test_workers_that_do_not_even_start_are_given_up():
    with pytest.raises(WorkersLostError, match=r"keep dying at a \(the last one ended with s.* 3"):
        run(["a"], make=die_at_start)


def test_a_crash_is_charged_to_its_job_by_who_wants_it_so():
    jobs = ["a", *["crash"] * 30, "b"]
    assert run(jobs, ahead=2) == ["> a", *["crash: died of SIGSEGV"] * 30, "> b"]
    with (
        pytest.raises(WorkersLostError, match=r"at crash \(the last one died of SIGSEGV\)"),
        pool() as workers,
    ):
        workers.map(jobs, kept, at)


@pytest.mark.parametrize(
    ("job", "error", "says"),
    [
        ("refuse", BadMachineError, r"^no such machine\.$"),
        ("exhaust", ResourceError, "there is not enough memory"),
        ("mistake", TraplineError, r"internal error in a worker \(ZeroDivisionError: a mistake\)"),
    ],
)
def test_an_error_of_a_worker_is_raised_by_its_parent(job, error, says):
    with pytest.raises(TraplineError, match=says) as raised:
        run(["a", job, "b"])
    assert type(raised.value) is error


def test_an_error_at_the_start_is_raised_too():
    with pytest.raises(BadMachineError, match=r"no such machine\."):
        run(["a"], make=refuse_to_start)


def test_native_noise_is_not_shown_unless_wanted(capfd, monkeypatch):
    monkeypatch.delenv("TRAPLINE_DEBUG", raising=False)
    run(["noise"])
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("TRAPLINE_DEBUG", "1")
    run(["noise"])
    assert capfd.readouterr().err == "native noise\n"


def test_no_worker_is_left_behind():
    before = set(multiprocessing.active_children())
    with pool() as workers:
        workers.map(["a", "b"], kept, at)
        inside = set(multiprocessing.active_children()) - before
        assert len(inside) == 2
    assert set(multiprocessing.active_children()) == before


def test_ctrl_c_does_not_reach_a_process_that_starts():
    """From the first moment on: a worker that loads its libraries has no handler of its own."""
    before = set(multiprocessing.active_children())
    with pool():
        started = set(multiprocessing.active_children()) - before
        for process in started:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            masks = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            kept_off = int(masks["SigBlk"], 16) | int(masks["SigIgn"], 16)
            assert kept_off >> (signal.SIGINT - 1) & 1
    assert len(started) == 2
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


SCRIPT = """
    import sys
    sys.path.insert(0, {here!r})
    from jobs import Echo
    from trapline.base.workers import Pool

    def say(answer):
        print(answer, flush=True)

    if __name__ == "__main__":
        try:
            with Pool(Echo, 2, advice="") as workers:
                workers.map(["a", "b"], say, str)
                workers.map(["hang", "hang"], say, str)
        except KeyboardInterrupt:
            sys.exit(130)
"""


def children(process):
    listing = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii")
    return [int(child) for child in listing.split()]


@pytest.fixture
def working(tmp_path):
    """A process whose workers are busy, and the workers as file descriptors."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT.format(here=str(Path(__file__).parent))))
    with subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert {process.stdout.readline(), process.stdout.readline()} == {b"a\n", b"b\n"}
        workers = [os.pidfd_open(pid) for pid in children(process.pid)]
        assert len(workers) >= 2  # and Python's resource tracker
        yield process, workers
        process.kill()
        for worker in workers:
            os.close(worker)


def have_ended(workers):
    # Readable once the process has ended.
    return all(select.select([worker], [], [], 60)[0] for worker in workers)


def test_ctrl_c_ends_all_processes_without_a_word(working):
    process, workers = working
    os.killpg(process.pid, signal.SIGINT)  # to the whole group, as a terminal does
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")
    assert have_ended(workers)


def test_busy_workers_end_with_a_parent_that_is_killed(working):
    process, workers = working
    process.kill()
    assert have_ended(workers)
