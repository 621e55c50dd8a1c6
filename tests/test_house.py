"""The house: rooms, ways through it, no circles. import-linter checks that imports go down."""

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "trapline"
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
LARGEST = 0.2  # the share of all lines that one room may have


def modules():
    return {
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in SOURCE.rglob("*.py")
    }


def imported(tree, names):
    """Yield the modules that are imported when a module is, or when a function of it runs."""
    pending = list(ast.iter_child_nodes(tree))
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in names else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            pending += ast.iter_child_nodes(node)


def circles(graph):
    """Yield the modules that import themselves by way of others."""
    for start in graph:
        seen, pending = set(), list(graph[start])
        while pending:
            name = pending.pop()
            if name not in seen:
                seen.add(name)
                pending += graph[name]
        if start in seen:
            yield start


def graph_of(sources):
    return {
        name: set(imported(ast.parse(text), sources)) & set(sources) - {name}
        for name, text in sources.items()
    }


def test_a_circle_is_found_and_its_mended_twin_is_none():
    circle = {"a": "from b import x", "b": "def f():\n    import a", "c": "import a"}
    assert sorted(circles(graph_of(circle))) == ["a", "b"]
    assert not list(circles(graph_of(circle | {"b": "if TYPE_CHECKING:\n    import a"})))


def test_no_module_imports_itself_by_way_of_others():
    sources = {name: path.read_text("utf-8") for name, path in modules().items()}
    # The package's face names what is public, and loads it when it is first used.
    del sources["trapline"]
    assert not list(circles(graph_of(sources)))


def test_no_room_has_most_of_the_house():
    lines = Counter()
    for path in modules().values():
        lines[path.relative_to(SOURCE).parts[0]] += len(path.read_text("utf-8").splitlines())
    room, count = lines.most_common(1)[0]
    assert count <= LARGEST * lines.total(), f"{room} has {count} of {lines.total()} lines"


def test_the_page_names_each_room():
    rooms = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    table = PAGE[PAGE.index("| room |") : PAGE.index("Where would these go?")]
    first = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`(\w+)`", first)) == rooms


def test_the_ways_through_the_house_are_there():
    ways = PAGE[PAGE.index("## Four ways") : PAGE.index("## Errors")]
    files = re.findall(r"^\d+\. `([^`]+)`", ways, re.MULTILINE)
    assert ways.count("\n### ") == 4
    assert len(files) > 40
    assert [name for name in files if not (SOURCE / name).is_file()] == []


def test_modules_of_one_name_are_the_same_thing_for_two_rooms():
    """`results/scan.py` and `cli/scan.py` are the scan's; a second `engine.py` is another thing."""
    shared = {"results", "report", "cli", "api"}  # one file for each command or document
    names = Counter(
        path.stem
        for path in modules().values()
        if path.stem != "__init__" and path.relative_to(SOURCE).parts[0] not in shared
    )
    assert {name for name, count in names.items() if count > 1} <= TWICE


# Each explained: what the same word means in both rooms.
TWICE = {
    "baseline",  # explore, verify: what an earlier result had already
    "engine",  # cpu, cpu/unicorn: the protocol, and what keeps it
    "events",  # cpu, explore: NMIs, interrupts, exceptions
    "registers",  # explore, gdb: those of the processor
}
