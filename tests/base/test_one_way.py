"""What comes from outside has one way in, and what goes out one way out: the code is walked.

A module outside base/ that opens, reads, decodes or writes a file by itself is found here. Those
that must are listed, with the reason; one that needs it no more must leave the list.
"""

import ast
from pathlib import Path

import pytest

import trapline

ROOT = Path(trapline.__file__).parent
# Modules of the standard library and others that make something of bytes from outside.
DECODERS = {
    "bz2", "configparser", "csv", "gzip", "json", "lzma", "marshal", "pickle", "plistlib",
    "shelve", "sqlite3", "tarfile", "tomllib", "xml", "yaml", "zipfile", "zlib", "zstandard",
}  # fmt: skip
# Methods that open, read or write a file by its name, and functions that do.
METHODS = {"open", "read_text", "read_bytes", "write_text", "write_bytes"}
FUNCTIONS = {
    "open", "os.open", "os.fdopen", "os.replace", "os.rename", "io.open",
    "tempfile.mkstemp", "tempfile.NamedTemporaryFile", "tempfile.TemporaryFile",
    "msgspec.json.decode", "msgspec.json.Decoder", "msgspec.json.encode", "msgspec.json.Encoder",
    "msgspec.toml.decode", "msgspec.yaml.decode",
    "np.fromfile", "np.load", "np.memmap", "mmap.mmap",
}  # fmt: skip
EXCEPTIONS = {
    # Decoders of one form, each with limits of its own: they are the one way for that form.
    ("kernel/elf/compression.py", "zlib"): "unpacks gzip, of images, modules and initrds",
    ("kernel/elf/compression.py", "bz2"): "unpacks bzip2",
    ("kernel/elf/compression.py", "lzma"): "unpacks xz and lzma",
    ("kernel/elf/compression.py", "zstandard"): "unpacks zstd",
    ("rules/tables.py", "csv"): "parses tables of rules, with the line of each fault",
    ("rules/tables.py", ".read_bytes"): "tables that ship, from wherever Python has them",
    ("report/formats/csv_rows.py", "csv"): "writes CSV",
    # What the system says of this very process.
    ("cpu/unicorn/ram.py", "open"): "/proc/self/pagemap",
    ("cpu/unicorn/ram.py", "mmap.mmap"): "memory of its own that has a name but no file",
    ("cpu/unicorn/selfcheck.py", "os.open"): "/proc/self/mem",
    # Descriptors that must be open, or be nothing.
    ("cli/start.py", "os.open"): "/dev/null for standard descriptors that are closed",
    ("cli/start.py", "open"): "/dev/null for standard error that is closed",
    ("report/output.py", "os.open"): "/dev/null for a reader that went away",
    ("kernel/find/deb.py", "os.open"): "the lock of the cache, which has no contents",
    # Files that another program opens.
    ("machine/qemu/catalogue.py", ".open"): "asks whether QEMU may read or write an image",
    ("verify/chunks.py", ".open"): "TargetSource.open: boots a guest",
}


def functions(tree):
    """Yield (line, what) for each call and import that opens or decodes by itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        for name in names:
            if name.partition(".")[0] in DECODERS:
                yield node.lineno, name.partition(".")[0]
        if isinstance(node, ast.Call):
            what = called(node)
            if what is not None:
                yield node.lineno, what


def called(node):
    name = ast.unparse(node.func)
    if name == "mmap.mmap" and ast.unparse(node.args[0]) == "-1":
        return None  # memory of no file
    if name in FUNCTIONS:
        return name
    receiver, dot, method = name.rpartition(".")
    # A class has a way of its own, which ends in base/: ElfFile.open(path).
    is_class = receiver.replace(".", "").isidentifier() and receiver[:1].isupper()
    if dot and method in METHODS and not is_class:
        return f".{method}"
    return None


def found(source):
    return {what for _, what in functions(ast.parse(source))}


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("open(path)", "open"),
        ("with path.open('rb') as file: pass", ".open"),
        ("self._path.read_bytes()", ".read_bytes"),
        ("Path(name).write_text('')", ".write_text"),
        ("import tomllib", "tomllib"),
        ("from json import loads", "json"),
        ("import xml.etree", "xml"),
        ("msgspec.json.decode(data)", "msgspec.json.decode"),
        ("os.open(path, 0)", "os.open"),
        ("mmap.mmap(descriptor, 0)", "mmap.mmap"),
    ],
)
def test_the_walk_finds_what_it_is_for(source, what):
    assert found(source) == {what}


@pytest.mark.parametrize(
    "source", ["ElfFile.open(path)", "mmap.mmap(-1, 4096)", "files.read(path)", "opened(path)"]
)
def test_the_walk_passes_what_is_sound(source):
    assert found(source) == set()


def test_files_are_opened_and_decoded_in_base_alone():
    seen = set()
    astray = []
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        if place.startswith("base/"):
            continue
        for line, what in functions(ast.parse(path.read_text(encoding="utf-8"))):
            if (place, what) in EXCEPTIONS:
                seen.add((place, what))
            else:
                astray.append(f"{place}:{line}: {what}")
    assert astray == []
    assert seen == set(EXCEPTIONS)
