"""Measures how long it takes to start: `import trapline`, --help, one completion.

    python benchmarks/startup.py [ROUNDS]

Each is a new process; the smallest of the rounds counts, in seconds, and as a ratio to a Python
that does nothing, which the same rounds measure: a busy machine slows both. Asked for:
`import trapline` in 0.15 s, `trapline --help` in 0.25 s.
"""

import os
import subprocess
import sys
import time

RUN = "import sys; from trapline.cli.main import run; sys.exit(run({}))"
COMMANDS = {
    "Python alone": "pass",
    "import trapline": "import trapline",
    "trapline --help": RUN.format(["--help"]),
    "trapline scan --help": RUN.format(["scan", "--help"]),
    "trapline boot --help": RUN.format(["boot", "--help"]),
    "completing `trapline b`": RUN.format([]),
}
COMPLETION = {
    "_TRAPLINE_COMPLETE": "bash_complete",
    "COMP_WORDS": "trapline b",
    "COMP_CWORD": "1",
}


def seconds(name: str) -> float:
    """Run once."""
    environment = os.environ | (COMPLETION if name.startswith("completing") else {})
    command = [sys.executable, "-c", COMMANDS[name]]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start


def main() -> None:
    """Measure all of them in turn, round by round."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    best = dict.fromkeys(COMMANDS, float("inf"))
    for _ in range(rounds):
        for name in COMMANDS:
            best[name] = min(best[name], seconds(name))
    alone = best["Python alone"]
    for name, time_taken in best.items():
        print(f"{name:24} {time_taken:6.3f} s  {time_taken / alone:5.1f} x")


if __name__ == "__main__":
    main()
