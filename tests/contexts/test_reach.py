"""What contexts reach, of small kernels: one fault each, found with its chain, and a sound twin."""

import datetime as dt
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from trapline.api.allow import allow_list
from trapline.api.kernel import open_kernel
from trapline.contexts.closed import Closed, Known, shipped
from trapline.contexts.largestcycle import core
from trapline.contexts.reach import Contexts
from trapline.kernel.binary import Binary
from trapline.kernel.calls.build import build_graph
from trapline.linux.calls import CALL_NAMES
from trapline.linux.roots import ROOTS
from trapline.results.labels import LabelEntry
from trapline.scan.stored import scan_once

pytestmark = pytest.mark.skipif(shutil.which("pahole") is None, reason="pahole is not installed")
HERE = Path(__file__).parent
PAHOLE = os.environ | {"LLVM_OBJCOPY": "objcopy"}  # binutils
SOURCE = (HERE / "reach_kernel.c").read_text("utf-8")
LINK = HERE.parent / "kernel" / "calls_kernel.lds"
PLACES = ("OPS", "STATIC", "BEFORE", "AFTER", "NMI", "GATE", "CONSOLE", "PRINTK")
CORE = 120
CFLAGS = (
    *("-O2", "-g", "-ffreestanding", "-fno-pic", "-no-pie", "-mcmodel=kernel", "-mno-sse"),
    *("-fno-stack-protector", "-fcf-protection=none", "-fno-optimize-sibling-calls", "-nostdlib"),
    *("-static", f"-Wl,-T,{LINK},--no-warn-rwx-segments"),
)


class Kernels:
    """Builds each kernel once; `of` has a statement at each of some places."""

    def __init__(self, folder):
        self._folder = folder
        self._known = {}

    def of(self, closed=None, named=(), **statements):
        key = tuple(sorted(statements.items()))
        if key not in self._known:
            self._known[key] = self._build(statements)
        binary, graph, sites = self._known[key]
        found = Contexts(binary, graph, sites, closed or Closed()).all(named)
        return {reach.id: reach for reach in found}

    def _build(self, statements):
        source = SOURCE
        for place in PLACES:
            source = source.replace(f"AT_{place};", f"{statements.get(place, 'harmless()')};")
        # Each calls the next, and the last the first: the core of a kernel.
        cycle = [f"void core_{n}(void);" for n in range(CORE)]
        cycle += [
            f"F void core_{n}(void) {{ core_{(n + 1) % CORE}(); count++; }}" for n in range(1, CORE)
        ]
        cycle.append("F void core_0(void) { core_1(); touch(); }")
        head, mark, rest = source.partition("F void __warn_printk")
        folder = self._folder / str(len(self._known))
        folder.mkdir()
        (folder / "k.c").write_text("\n".join((head, *cycle, mark + rest)))
        path = folder / "vmlinux"
        subprocess.run(["gcc", *CFLAGS, "k.c", "-o", "vmlinux"], cwd=folder, check=True)
        subprocess.run(["pahole", "-J", path], cwd=folder, check=True, env=PAHOLE)
        kernel = open_kernel(path)
        scan = scan_once(kernel.files, (), allow_list(), None)
        binary = Binary.open_vmlinux(path)
        return binary, build_graph(binary, CALL_NAMES), scan.sites


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return Kernels(tmp_path_factory.mktemp("reach"))


def chains(reach):
    return {tuple(step.function for step in site.chain) for site in reach.sites}


WAYS = {
    "BEFORE": ("ve-before", ("exc_virtualization_exception", "early", "touch")),
    "AFTER": (
        "ve-after",
        ("exc_virtualization_exception", "tdx_handle_virt_exception", "touch"),
    ),
    "NMI": ("nmi", ("watchdog", "touch")),
    "CONSOLE": ("console", ("con_write", "touch")),
    "OPS": (
        "ve-after",
        (
            *("exc_virtualization_exception", "tdx_handle_virt_exception"),
            *("use_port", "mem_in", "touch"),
        ),
    ),
    "STATIC": (
        "ve-after",
        (
            *("exc_virtualization_exception", "tdx_handle_virt_exception"),
            *("use_static", "way", "touch"),
        ),
    ),
}


@pytest.mark.parametrize("place", WAYS)
def test_a_fault_is_found_with_its_chain_and_the_twin_has_none(kernels, place):
    context, chain = WAYS[place]
    assert chains(kernels.of()[context]) == set()
    assert chain in chains(kernels.of(**{place: "touch()"})[context])


def test_what_comes_behind_the_call_is_not_before_it(kernels):
    assert kernels.of(AFTER="touch()")["ve-before"].sites == ()
    assert kernels.of(BEFORE="touch()")["ve-after"].sites == ()


def test_steps_tell_line_kind_and_number_of_targets(kernels):
    (site,) = kernels.of(OPS="touch()")["ve-after"].sites
    lines = SOURCE.splitlines()
    kinds = {step.function: (step.edge, step.targets) for step in site.chain}
    assert kinds["use_port"] == ("table", 1)
    assert kinds["touch"] == (None, 0)
    assert all(step.file.endswith("k.c") and step.line for step in site.chain)
    assert len(lines) > 10


def test_a_gate_is_the_way_into_the_core_and_open_until_a_reason_closes_it(kernels):
    reach = kernels.of(Closed((), ()), GATE="core_5()")["nmi"]
    (gate,) = reach.open_gates
    assert gate.function == "core_5"
    assert gate.sites == 1  # that of touch(), which the core calls
    assert gate.functions >= CORE
    assert not reach.sites
    known = Known(function="core_5", reason="it is", source="k.c")
    closed = kernels.of(Closed((), (known,)), GATE="core_5()")["nmi"]
    assert not closed.open_gates
    assert [(g.function, g.reason) for g in closed.gates] == [("core_5", "it is")]
    # A reason for another context closes nothing here.
    other = Known(function="core_5", reason="it is", source="k.c", contexts=("idle",))
    assert kernels.of(Closed((), (other,)), GATE="core_5()")["nmi"].open_gates


def label(**fits):
    return LabelEntry(
        label=fits.pop("label", "safe"),
        reason="looked at",
        owner="ada",
        date=dt.date(2026, 1, 2),
        **fits,
    )


def test_a_file_of_labels_closes_a_gate_by_name_pattern_and_id(kernels):
    (gate,) = kernels.of(Closed((), ()), GATE="core_5()")["nmi"].open_gates
    for entry in (label(gate="core_5"), label(gate="core_*"), label(id=gate.id)):
        reach = kernels.of(Closed((entry,), ()), GATE="core_5()")["nmi"]
        assert not reach.open_gates
        assert "ada" in next(g.by for g in reach.gates if g.function == "core_5")
    concern = label(gate="core_5", label="concern")
    assert kernels.of(Closed((concern,), ()), GATE="core_5()")["nmi"].open_gates


def test_a_closed_gate_does_not_hide_what_another_way_leads_to(kernels):
    known = Known(function="core_5", reason="it is", source="k.c")
    reach = kernels.of(Closed((), (known,)), GATE="core_5(); core_7()")["nmi"]
    # Without it the rest is no cycle any more: what it reaches is listed.
    assert any(chain[:2] == ("exc_nmi", "core_7") for chain in chains(reach))
    assert all("core_5" not in chain for chain in chains(reach))


def test_the_way_from_a_handler_to_a_console(kernels):
    assert kernels.of()["int3"].console == ()
    way = kernels.of(PRINTK='_printk(c, "x")')["int3"].console
    assert [step.function for step in way] == ["exc_int3", "notify", "_printk", "con_write"]
    assert way[2].edge == "table"


def test_idle_code_leaves_the_guest(kernels):
    (site,) = kernels.of()["idle"].sites
    assert site.trap == "hlt"
    assert not kernels.of()["idle"].forbidden


def test_from_a_function_that_the_user_names(kernels):
    found = kernels.of(named=["use_port"], OPS="touch()")
    assert list(found) == ["from-use_port"]
    assert found["from-use_port"].forbidden
    assert chains(found["from-use_port"]) == {("use_port", "mem_in", "touch")}
    assert chains(kernels.of(named=["use_port"])["from-use_port"]) == set()


def test_what_a_kernel_has_not_is_said(kernels):
    reach = kernels.of()
    assert "x86_64_start_kernel" in reach["early"].missing[0]
    assert reach["early"].functions == ()


def test_ids_have_no_address(kernels):
    one = kernels.of(Closed((), ()), GATE="core_5()")["nmi"].gates
    other = kernels.of(Closed((), ()), GATE="core_5()", AFTER="touch(); count += 7")["nmi"].gates
    assert [gate.id for gate in one] == [gate.id for gate in other]


def test_the_core_is_the_largest_cycle():
    ring = {n: ((n + 1) % 200,) for n in range(200)}
    ring[300] = (5,)
    ring[5] = (6, 400)
    assert core(ring, lambda n: ring.get(n, ())) == frozenset(range(200))
    small = {n: ((n + 1) % 50,) for n in range(50)}
    assert core(small, lambda n: small.get(n, ())) == frozenset()


def test_the_reasons_that_are_shipped_name_contexts_that_there_are():
    ids = {root.id for root in ROOTS}
    assert shipped()
    for known in shipped():
        assert set(known.contexts) <= ids
        assert known.reason
        assert "," in known.source
