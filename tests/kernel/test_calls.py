"""The call graph of small kernels that gcc and pahole make: each kind of edge, and its twin."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from trapline.kernel.binary import Binary
from trapline.kernel.calls.build import build_graph
from trapline.linux.calls import CALL_NAMES

pytestmark = pytest.mark.skipif(shutil.which("pahole") is None, reason="pahole is not installed")
HERE = Path(__file__).parent
PAHOLE = os.environ | {"LLVM_OBJCOPY": "objcopy"}  # binutils
SOURCE = (HERE / "calls_kernel.c").read_text("utf-8")
LINK = (HERE / "calls_kernel.lds").read_text("utf-8")
CFLAGS = (
    *("-O2", "-g", "-ffreestanding", "-fno-pic", "-no-pie", "-mcmodel=kernel", "-mno-sse"),
    *("-fno-stack-protector", "-fcf-protection=none", "-fno-optimize-sibling-calls", "-nostdlib"),
)


def build(folder, source, *, types=True, flags=()):
    (folder / "k.c").write_text(source)
    (folder / "k.lds").write_text(LINK)
    out = folder / "vmlinux"
    subprocess.run(
        [
            "gcc",
            *CFLAGS,
            *flags,
            "-static",
            "-Wl,-T,k.lds,--no-warn-rwx-segments",
            "k.c",
            "-o",
            out,
        ],
        cwd=folder,
        check=True,
    )
    if types:
        subprocess.run(["pahole", "-J", out], cwd=folder, check=True, env=PAHOLE)
    return out


class Small:
    def __init__(self, path):
        self.binary = Binary.open_vmlinux(path)
        self.graph = build_graph(self.binary, CALL_NAMES)

    def address(self, name):
        return self.binary.address_of(name)

    def edges(self, name):
        """Return (name of the target, kind, how many) of each edge out of a function."""
        return {
            (self.binary.symbol_at(edge.target).name, edge.kind, edge.ways)
            for edge in self.graph.edges(self.address(name))
        }

    def closure(self, name, without=()):
        found = self.graph.closure([self.address(name)], {self.address(n) for n in without})
        return {self.binary.symbol_at(address).name for address in found}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Small(build(tmp_path_factory.mktemp("calls"), SOURCE))


def test_direct_calls_and_what_is_behind_them(small):
    assert small.edges("two") == {("give", "call", 1), ("disk_open", "call", 1)}
    assert "worker" in small.closure("two")
    assert "worker" not in small.closure("two", without=["give"])


def test_an_operations_table_is_found_by_type_and_no_other_of_its_prototype(small):
    assert small.edges("call_open") == {("disk_open", "table", 2), ("net_open", "table", 2)}
    # A null member adds nothing, and `own` is of the same type as what `ops` points to.
    assert small.edges("call_stop") == {("disk_stop", "table", 1)}


def test_a_member_that_code_sets(small):
    assert small.edges("call_late") == {("set_later", "table", 1)}


def test_a_member_that_is_only_copied_to_may_be_all_of_its_prototype(small):
    edges = small.edges("run_work")
    assert {kind for _, kind, _ in edges} == {"prototype"}
    assert {name for name, _, _ in edges} >= {"disk_open", "net_open", "other"}
    assert "disk_stop" not in {name for name, _, _ in edges}


def test_a_function_handed_to_another(small):
    assert small.edges("run") == {("worker", "argument", 1)}


def test_a_global_pointer(small):
    assert small.edges("call_wanted") == {("never_given", "variable", 1)}


def test_paravirt_calls_have_what_stands_there_and_what_is_put_there(small):
    assert small.edges("idle") == {("native_halt", "paravirt", 2), ("guest_halt", "paravirt", 2)}


def test_an_alternative_leads_to_both(small):
    edges = small.edges("with_alternative")
    assert {name for name, _, _ in edges} == {"feature_on", "feature_off"}
    assert {ways for _, _, ways in edges} == {2}


def test_a_static_call_leads_to_what_its_key_has_and_gets(small):
    edges = small.edges("use_static")
    assert edges == {("first", "static call", 2), ("second", "static call", 2)}


def test_what_cannot_be_told_is_an_edge_to_all_that_fits(small):
    kinds = {kind for _, kind, _ in small.edges("call_unknown")}
    assert kinds <= {"offset", "unknown"}
    assert "disk_open" in {name for name, _, _ in small.edges("call_unknown")}


def test_targets_of_a_site(small):
    (site,) = {edge.site for edge in small.graph.edges(small.address("run"))}
    assert small.graph.targets(site) == {small.address("worker")}
    assert small.graph.targets(site + 1) == frozenset()


def test_a_jump_table_is_read(tmp_path):
    small = Small(build(tmp_path, SOURCE, flags=["-fjump-tables"]))
    sites = [s for s in small.graph.indirect if small.binary.symbol_at(s).name == "switched"]
    if not sites:
        pytest.skip("this gcc makes no table of the switch")
    start = small.address("switched")
    assert all(
        start < target < start + 4096 for site in sites for target in small.graph.targets(site)
    )
    assert {name for name, _, _ in small.edges("switched")} >= {"disk_open", "give"}


def test_without_types_nothing_is_left_out(tmp_path):
    small = Small(build(tmp_path, SOURCE, types=False))
    names = {name for name, _, _ in small.edges("call_open")}
    assert names >= {"disk_open", "net_open", "other"}
    assert {kind for _, kind, _ in small.edges("call_open")} <= {"offset", "unknown"}
    assert small.edges("idle") == {("native_halt", "paravirt", 2), ("guest_halt", "paravirt", 2)}


def test_the_table_of_another_type_is_not_taken_for_one(tmp_path):
    # The planted fault is a third driver's table: it must be seen.
    planted = SOURCE.replace(
        "struct late late;", "struct ops third_ops = { other }; struct late late;"
    )
    small = Small(build(tmp_path, planted))
    assert small.edges("call_open") == {
        (name, "table", 3) for name in ("disk_open", "net_open", "other")
    }


def test_retpolines_are_indirect_calls(tmp_path):
    registers = ("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
    thunks = "".join(
        f'asm(".globl {name}\\n.type {name},@function\\n{name}: {code}\\n"'
        f'".size {name}, . - {name}");\n'
        for name, code in (
            *((f"__x86_indirect_thunk_{name}", f"jmp *%{name}") for name in registers),
            ("__x86_return_thunk", "ret; int3"),
        )
    )
    flags = ("-mindirect-branch=thunk-extern", "-mfunction-return=thunk-extern", "-fno-jump-tables")
    small = Small(build(tmp_path, thunks + SOURCE, flags=flags))
    assert small.edges("run") == {("worker", "argument", 1)}
    assert small.edges("call_open") == {("disk_open", "table", 2), ("net_open", "table", 2)}
    assert all("thunk" not in name for name in small.closure("two"))


def test_a_hash_before_the_call_tells_its_targets(tmp_path):
    # What clang makes of a kernel with CONFIG_CFI_CLANG: a hash before each function.
    hashed = """
    asm(".text\\n.long 0x11223344\\n.globl fits\\n.type fits,@function\\n"
        "fits: ret\\n.size fits, 1\\n"
        ".long 0x11223344\\n.globl also\\n.type also,@function\\nalso: ret\\n.size also, 1\\n"
        ".long 0x55667788\\n.globl not_it\\n.type not_it,@function\\n"
        "not_it: ret\\n.size not_it, 1");
    void fits(void); void also(void); void not_it(void);
    void (*hashed_table[])(void) = { fits, also, not_it };
    F void call_hashed(void **p) { asm volatile("mov (%0),%%r11\\nmov $-0x11223344,%%r10d\\n"
        "add -4(%%r11),%%r10d\\nje 1f\\nud2\\n1: call *%%r11"
        : : "r"(p) : "memory", "r10", "r11"); }
    """
    small = Small(
        build(
            tmp_path, SOURCE.replace("struct driver a_driver;", hashed + "struct driver a_driver;")
        )
    )
    assert small.edges("call_hashed") == {("fits", "kcfi", 2), ("also", "kcfi", 2)}


def test_two_builds_of_a_graph_are_the_same(small):
    again = build_graph(small.binary, CALL_NAMES)
    assert {s: again.targets(s) for s in again.indirect} == {
        s: small.graph.targets(s) for s in small.graph.indirect
    }
    assert list(again.indirect) == list(small.graph.indirect)
