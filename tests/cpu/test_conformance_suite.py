"""The conformance suite of CPU engines fails for an engine that does not conform."""

import subprocess
import sys
from pathlib import Path

import broken_engines

SUITE = Path(__file__).parent / "conformance"
# One test for each fault; the sound twin passes all of them.
TESTS = {
    "forgets_nmi_blocking": "test_an_nmi_blocks_further_ones_until_iret",
    "loses_host_writes": "test_memory_comes_back_whoever_wrote_it",
    "counts_one_less": "test_an_instruction_budget_is_exact",
}


def test_each_broken_engine_fails_and_its_sound_twin_passes():
    names = [f"broken_engines:{name}" for name in broken_engines.__all__]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", str(SUITE), "-p", "no:xdist", "-rA", "--tb=no"),
            *(argument for name in names for argument in ("--engine", name)),
            *("-k", " or ".join(TESTS.values())),
        ],
        cwd=SUITE.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    results = {
        line.split("::")[1].split(" - ")[0]: line.split()[0]
        for line in done.stdout.splitlines()
        if line.startswith(("PASSED", "FAILED"))
    }
    assert len(results) == len(names) * len(TESTS)
    for engine in names:
        for fault, test in TESTS.items():
            expected = "FAILED" if engine.endswith(f":{fault}") else "PASSED"
            assert results[f"{test}[{engine}]"] == expected, (engine, test)
