"""Whether verify finds faults that are planted in a kernel's #VE handler by source patch.

    python benchmarks/verify_faults.py [NAME...]

kernels/faults/*.patch are applied to the kernel `minimal` (tools/build-kernel), a minute each; the
second paragraph of a patch says what finding it must give. Held against the sound kernel as the
baseline, a fault must make exactly one finding worse, of that class and kind, with those words in
its cause or forms. Prints a row for each and exits with 1 if one is missed.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import trapline
from trapline.results.verify import VerifyResult, Worse
from trapline.verify import baseline

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "kernels" / "faults"
BUILD = ROOT / "tools" / "build-kernel"
BASE = "minimal"


def build(*arguments: str) -> Path:
    """Build a kernel and return its tree."""
    run = subprocess.run([BUILD, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return Path(run.stdout.strip())


def verified(tree: Path) -> VerifyResult:
    """Run all cases."""
    return trapline.verify(tree, scan=False)


def wanted(patch: Path) -> str:
    """Return what a patch says that it must give."""
    found = re.search(r"^Finds: (.*)$", patch.read_text("utf-8"), re.MULTILINE)
    assert found is not None, f"{patch} does not say what it must give"
    return found[1]


def is_found(expected: str, result: VerifyResult, worse: tuple[Worse, ...]) -> bool:
    """Whether exactly one finding is worse, and it is the one expected."""
    if len(worse) != 1:
        return False
    finding = next(each for each in result.findings if each.id == worse[0].id)
    trap, kind, words = expected.split(" ", 2)
    text = f"{finding.cause} {'; '.join(finding.forms)}"
    return (finding.trap, finding.kind) == (trap, kind) and words in text


def shown(result: VerifyResult, worse: tuple[Worse, ...]) -> str:
    """Say what became worse."""
    findings = {each.id: each for each in result.findings}
    return "; ".join(
        f"{found.trap} {found.kind} {found.cause} ({len(found.forms)} forms, {each.why})"
        for each in worse
        for found in [findings[each.id]]
    )


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    names = parser.parse_args().names or sorted(path.stem for path in FAULTS.glob("*.patch"))
    missed = 0
    sound = verified(build(BASE))
    print(f"{'sound':20} {len(sound.findings)} findings", flush=True)
    for name in names:
        patch = FAULTS / f"{name}.patch"
        start = time.monotonic()
        tree = build(BASE, "--patch", str(patch), "--as", f"fault-{name}")
        result = verified(tree)
        worse = baseline.worse(sound, result)
        found = is_found(wanted(patch), result, worse)
        missed += not found
        print(
            f"{name:20} {'found' if found else 'MISSED'} {time.monotonic() - start:4.0f} s "
            f"{shown(result, worse)}",
            flush=True,
        )
        shutil.rmtree(tree.parent)
    print(f"{len(names) - missed} of {len(names)} found, each as one finding of its cause")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
