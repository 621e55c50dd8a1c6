"""Measures campaigns: injections a second, two workers against one, restores, memory.

    python benchmarks/explore.py [KERNEL]

KERNEL is as for `trapline explore`; default: Debian's 6.12 cloud kernel, fetched with apt. Asked
for: 2,000 recovering NMI injections a second and core, two workers 1.8 times one, 25 us for a
restore at 100 dirty pages, guest memory + 200 MiB a worker, ten minutes for all scenarios on
two cores.
"""

import resource
import statistics
import sys
import time

from trapline.boot.plan import BootOptions, make_plan
from trapline.explore import campaign, scenario
from trapline.explore.campaign import Ledger, LocalWorkers
from trapline.explore.course import Run
from trapline.explore.stage import Stage, StageConfig
from trapline.explore.store import Store
from trapline.guest.target import TargetSource
from trapline.kernel.find.locate import locate

DEFAULT_KERNEL = "deb:linux-image-6.12-cloud-amd64|linux-image-cloud-amd64"
PAGES = 100
ROUNDS = 200
MIB = 1 << 20


def configuration(kernel: str, *names: str) -> StageConfig:
    """Name a campaign of some scenarios by the rules."""
    files = locate(kernel, announce=print)
    assert files.vmlinux is not None
    source = TargetSource(
        kernel=kernel,
        vmlinux=files.vmlinux,
        initrd=make_plan(files, BootOptions()).initrd,
        release=files.release,
    )
    return StageConfig(source, tuple(map(scenario.load, names)), names)


def measure_injections(config: StageConfig) -> None:
    """Inject an NMI at every boundary of a system call, in this process, three times."""
    with Stage(config) as stage:
        plan = next(stage.plans())
        injector, window = stage._injector, stage._window  # noqa: SLF001 - nothing else needs them
        assert injector is not None
        assert window is not None
        rates = []
        executed = 0
        for _ in range(3):
            start = time.perf_counter()
            results = [injector.run(Run("nmi", k)) for k in range(plan.window.instructions)]
            rates.append(len(results) / (time.perf_counter() - start))
            executed = sum(r.instructions for r in results) // len(results)
            assert all(r.verdict in ("same", "handled", "held") for r in results)
        print(
            f"NMI at {plan.window.instructions} boundaries of a system call: "
            f"{max(rates):,.0f} a second (of {', '.join(f'{r:,.0f}' for r in rates)}), about "
            f"{executed:,} instructions each"
        )
        measure_restores(window)


def measure_restores(window) -> None:  # noqa: ANN001 - a LiveWindow
    """Restore a machine of which 100 pages were written."""
    vcpu = window.vcpu
    durations = []
    for _ in range(ROUNDS):
        window.rewind()
        for page in range(PAGES):
            vcpu.memory.ram[0x4000000 + page * 4096] = 1
            vcpu.memory.code_changed(0x4000000 + page * 4096, 1)
        start = time.perf_counter()
        window.rewind()
        durations.append(time.perf_counter() - start)
    print(
        f"restore at {PAGES} dirty pages: median {statistics.median(durations) * 1e6:.1f} us, "
        f"best {min(durations) * 1e6:.1f} us"
    )


def run(config: StageConfig, workers: int) -> tuple[float, float, int]:
    """Run a campaign; seconds from the first finished chunk on, seconds in all, runs."""
    times: list[tuple[float, int]] = []

    def progress(done: int, total: int) -> None:
        del total
        if done:
            times.append((time.perf_counter(), done))

    start = time.perf_counter()
    with Store.open(None, campaign.identity(config, None), resume=False) as store:
        LocalWorkers(config, workers, Ledger(store, config, progress)).run()
    whole = time.perf_counter() - start
    (first, before), (last, after) = times[0], times[-1]
    return (after - before) / (last - first), whole, after


def main() -> None:
    """Print all of it."""
    kernel = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_KERNEL
    measure_injections(configuration(kernel, "syscall-gap"))
    config = configuration(kernel, "ve-in-nmi")
    # Whoever else uses the machine slows one of two workers: the better of two counts.
    one, two = (max(run(config, workers)[0] for _ in range(2)) for workers in (1, 2))
    print(
        f"ve-in-nmi: {one:,.0f} runs a second by one worker, {two:,.0f} by two: {two / one:.2f} x"
    )
    config = configuration(kernel, *scenario.shipped())
    _, whole, runs = run(config, 2)
    print(f"all scenarios by the rules, 2 workers: {runs:,} tasks in {whole:.1f} s")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    guest = config.source.memory / MIB
    print(f"largest worker: {usage:.0f} MiB for a guest of {guest:.0f} MiB")


if __name__ == "__main__":
    main()
