"""How long the call graph and the reach of all contexts take, and how many targets a branch has.

    python benchmarks/contexts.py [KERNEL]

KERNEL (default: Debian's 6.12 cloud kernel, fetched once) is looked at once, in one process, with
no scan: finding the sites is what benchmarks/scan.py measures.
"""

import argparse
import resource
import statistics
import time

from trapline.api.kernel import open_kernel
from trapline.contexts.closed import Closed
from trapline.contexts.reach import Contexts
from trapline.kernel.binary import Binary
from trapline.kernel.calls.build import build_graph
from trapline.linux.calls import CALL_NAMES

KERNEL = "deb:linux-image-6.12-cloud-amd64|linux-image-cloud-amd64"
HANDLER = "tdx_handle_virt_exception"


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description="measure the call graph of a kernel")
    parser.add_argument("kernel", nargs="?", default=KERNEL)
    kernel = open_kernel(parser.parse_args().kernel)
    start, processor = time.perf_counter(), time.process_time()
    binary = Binary.open_vmlinux(kernel.vmlinux)
    graph = build_graph(binary, CALL_NAMES)
    print(
        f"graph: {time.perf_counter() - start:.1f} s, {time.process_time() - processor:.1f} s of"
        f" processor time, {len(graph.functions):,} functions"
    )
    sites = [site for site in graph.indirect.values() if site.kind != "alternative"]
    told = [len(site.targets) for site in sites if not site.is_guess]
    print(
        f"branches with a choice: {len(sites):,}, median"
        f" {statistics.median(len(site.targets) for site in sites):.0f} targets;"
        f" told {len(told):,}, median {statistics.median(told):.0f}"
    )
    for kind in sorted({site.kind for site in sites}):
        counts = [len(site.targets) for site in sites if site.kind == kind]
        print(f"  {kind}: {len(counts):,}, median {statistics.median(counts):.0f}")
    reach = list(Contexts(binary, graph, (), Closed()).all())
    named = list(Contexts(binary, graph, (), Closed((), ())).all([HANDLER]))
    for each in (*named, *reach):
        print(f"  {each.id}: {len(each.functions)} functions, {len(each.gates)} gates")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(
        f"all: {time.perf_counter() - start:.1f} s, {time.process_time() - processor:.1f} s of"
        f" processor time, {peak:,} MiB"
    )


if __name__ == "__main__":
    main()
